"""The texts around the turns of a conversation, and the same in Jinja."""

from __future__ import annotations

import json
from dataclasses import dataclass

from qlora_harness.data.conversation import Conversation, Turn
from qlora_harness.errors import DataError

# What --template takes beside the names of TEMPLATES.
NO_TEMPLATE = "none"
TOKENIZERS_OWN = "tokenizer"


@dataclass(frozen=True)
class Template:
    """The text around the turns of a conversation.

    An exchange is user_start, the user's text, assistant_start, reply_lead, the reply, reply_end
    and the end of turn: `end_token`, or the tokenizer's EOS. `between` separates exchanges.
    `context_start` comes between an instruction and its input. Each of `control_tokens` must be a
    single token.

    A system prompt stands between system_start and system_end, before the first user_start or,
    with `system_inside`, after it; without `system_end` the template holds none. Conversations
    that bring none get `default_system`, or `default_with_context` if the first turn has an input.
    With `bos_each`, BOS begins every exchange, not only the first.
    """

    user_start: str
    assistant_start: str
    reply_lead: str
    end_token: str | None = None
    between: str = ""
    control_tokens: tuple[str, ...] = ()
    reply_end: str = ""
    context_start: str = "\n\n"
    system_start: str = ""
    system_end: str = ""
    system_inside: bool = False
    default_system: str = ""
    default_with_context: str = ""
    bos_each: bool = False

    def user_text(self, turn: Turn) -> str:
        """Returns the text of a user's turn, with its context."""
        return turn.text + self.context_start + turn.context if turn.context else turn.text

    def system_of(self, conversation: Conversation) -> str:
        """Returns the system prompt of a conversation, or the template's own, or ""."""
        if conversation.system:
            return conversation.system
        has_context = self.default_with_context and conversation.turns[0].context
        return self.default_with_context if has_context else self.default_system


_ALPACA = "Below is an instruction that describes a task"
_ALPACA_END = "Write a response that appropriately completes the request."

TEMPLATES: dict[str, Template] = {
    # As in the text of timdettmers/openassistant-guanaco, which QLoRA trains on.
    "guanaco": Template("### Human: ", "### Assistant:", " "),
    "alpaca": Template("### Instruction:\n", "\n\n### Response:\n", ""),
    # As in the column `text` of tatsu-lab/alpaca.
    "alpaca-preamble": Template(
        "### Instruction:\n",
        "\n\n### Response:\n",
        "",
        context_start="\n\n### Input:\n",
        system_end="\n\n",
        default_system=f"{_ALPACA}. {_ALPACA_END}",
        default_with_context=(
            f"{_ALPACA}, paired with an input that provides further context. {_ALPACA_END}"
        ),
    ),
    "chatml": Template(
        "<|im_start|>user\n",
        "<|im_end|>\n<|im_start|>assistant\n",
        "",
        "<|im_end|>",
        "\n",
        ("<|im_start|>", "<|im_end|>"),
        system_start="<|im_start|>system\n",
        system_end="<|im_end|>\n",
    ),
    # As in meta-llama/Llama-2-7b-chat-hf, without its former default of a system prompt.
    "llama2": Template(
        "[INST] ",
        " [/INST]",
        " ",
        reply_end=" ",
        system_start="<<SYS>>\n",
        system_end="\n<</SYS>>\n\n",
        system_inside=True,
        bos_each=True,
    ),
    # Vicuna 1.1 and later.
    "vicuna": Template(
        "USER: ",
        " ASSISTANT:",
        " ",
        system_end=" ",
        default_system=(
            "A chat between a curious user and an artificial intelligence assistant. The assistant "
            "gives helpful, detailed, and polite answers to the user's questions."
        ),
    ),
}


def check_fits(conversation: Conversation, template: str) -> None:
    """Raises DataError if a template has no place for a part of a conversation."""
    is_text = conversation.turns[0].role == "text"
    if is_text and template != NO_TEMPLATE:
        raise DataError(
            f"{conversation.place}: plain text has no turns for --template {template}",
            f"Use --template {NO_TEMPLATE}, which learns every token of a text",
        )
    if not is_text and template == NO_TEMPLATE:
        raise DataError(
            f"{conversation.place}: --template {NO_TEMPLATE} is for plain text, and this row has "
            "turns",
            f"Use one of {', '.join(TEMPLATES)}, {TOKENIZERS_OWN}",
        )
    holds_none = template in TEMPLATES and not TEMPLATES[template].system_end
    if conversation.system and holds_none:
        able = [name for name, other in TEMPLATES.items() if other.system_end]
        raise DataError(
            f"{conversation.place}: --template {template} has no place for the system prompt",
            f"Use one of {', '.join(able)}, {TOKENIZERS_OWN}",
        )


def chat_template(name: str, *, leading_bos: bool, own: str | None = None) -> str | None:
    """Returns a template in Jinja, for `apply_chat_template`; None for plain text.

    `own` is the tokenizer's own, which --template tokenizer uses. Another gives the ids and the
    learned spans of `ChatEncoder`. A user turn already ends with assistant_start, so
    `add_generation_prompt` adds nothing. Ids differ in two cases: a message spells out a special
    token, which training reads as text; or, in alpaca and chatml, a reply begins with a newline,
    which some tokenizers merge with the template's.
    """
    if name == NO_TEMPLATE:
        return None
    if name == TOKENIZERS_OWN:
        return own
    template = TEMPLATES[name]
    bos = "{{ bos_token }}" if leading_bos else ""
    end = _quoted(template.end_token) if template.end_token else "eos_token"
    reply = _sum(_quoted(template.reply_lead), "message['content']", _quoted(template.reply_end))
    between = f"{{% if not loop.first %}}{{{{ {_quoted(template.between)} }}}}{{% endif %}}"
    user = _quoted(template.user_start)
    prompt = ["message['content']", _quoted(template.assistant_start)]
    system = _system(template)
    if template.system_inside:
        prompt.insert(0, "(shown_system if loop.first else '')")
    return "".join(
        [
            system,
            "" if template.bos_each else bos,
            "{{ shown_system }}" if system and not template.system_inside else "",
            "{% for message in turns %}" if system else "{% for message in messages %}",
            "{% if message['role'] == 'user' %}",
            bos if template.bos_each else "",
            between if template.between else "",
            f"{{{{ {_sum(user, *prompt)} }}}}",
            "{% elif message['role'] == 'assistant' %}",
            f"{{% generation %}}{{{{ {_sum(reply, end)} }}}}{{% endgeneration %}}",
            "{% else %}{{ raise_exception('this model was trained on user and assistant turns, ",
            "not on ' + message['role']) }}{% endif %}{% endfor %}",
        ]
    )


def _system(template: Template) -> str:
    """Sets `shown_system`, the system prompt with the text around it, and `turns`, the rest."""
    if not template.system_end:
        return ""
    around = _sum(_quoted(template.system_start), "system", _quoted(template.system_end))
    return (
        "{% if messages[0]['role'] == 'system' %}"
        "{% set system = messages[0]['content'] %}{% set turns = messages[1:] %}"
        f"{{% else %}}{{% set system = {_quoted(template.default_system)} %}}"
        "{% set turns = messages %}{% endif %}"
        f"{{% set shown_system = ({around}) if system else '' %}}"
    )


def _sum(*parts: str) -> str:
    return " + ".join(part for part in parts if part != '""')


_quoted = json.dumps  # Jinja reads JSON's strings
