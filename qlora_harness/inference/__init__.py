"""What a trained adapter is used for: answers to prompts, a chat, and a merged model."""
