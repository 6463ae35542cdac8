"""A LLaMA-type decoder layer with LoRA as one differentiable function on packed rows."""
