"""How a prompt is filled: once, from a file of two blocks, with every outside text between marks.

A prompt file is Jinja with a block `system` and a block `user`; a file without blocks is a system text. Each value is
written as it is, in one pass, so a response that contains template syntax comes out as it stands.

Outside texts stand between two marks that carry an HMAC of the text under the log's secret: whoever wrote the text
cannot know it, and equal texts have equal marks, so that equal prompts stay equal. Within them, the control tokens of
chat formats (`<|im_start|>`, `[INST]`, `<start_of_turn>`, ...) get a space after their first character, because
servers would otherwise read them as the end of the message. The stored response keeps its own text.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from jinja2 import StrictUndefined, Template, TemplateError, TemplateSyntaxError, meta, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from grape import resources
from grape.errors import ConfigError, known, one_line
from grape.types import Message

BLOCKS = ("system", "user")
ENVIRONMENT = ImmutableSandboxedEnvironment(
    undefined=StrictUndefined, autoescape=False, trim_blocks=True, lstrip_blocks=True
)
# The control tokens of the chat formats in use: <|name|>, <|name> and <name|>, with the wide bars of one family; the
# tags of sentence, turn and image; numbered ones; the bracketed ones. Operators (<|>, a <| b) are none.
CONTROL = re.compile(
    r"<(?=[|｜][^<>\s]{1,80}>|\w{1,40}[|｜]>"
    r"|/?s>|</?SYS>>|(?:bos|eos|pad|unk|mask|image|start_of_turn|end_of_turn|start_of_image|end_of_image|sop|eop|eod)>"
    r"|(?:seed:\w{1,20}|reserved_\d{1,4}|unused\d{1,4}|extra_id_\d{1,4}|SPECIAL_\d{1,4})>)"
    r"|\[(?=/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS|TOOL_CONTENT|IMG|PREFIX|SUFFIX|MIDDLE|THINK"
    r"|ARGS|CALL_ID|MODEL_SETTINGS|[gs]?MASK)\]|\|(?:system|user|assistant|tool|endofturn)\|\]|e~\[)"
    r"|\](?=~!?b[\[\]])"
)


def well_formed(text: str) -> str:
    """``text`` as Unicode that can be sent and stored: halves of surrogate pairs are joined, or become U+FFFD."""
    if text.isascii():
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def neutral(text: str) -> str:
    """``text`` with the control tokens of chat formats broken by a space."""
    return CONTROL.sub(lambda found: f"{found[0]} ", well_formed(text))


def fence(name: str, text: str, secret: bytes) -> str:
    """``text`` between its two marks. The code is 128 bits of HMAC-SHA256 over what the text is called and itself."""
    content = f"{name}\0{text}".encode("utf-8", "surrogatepass")
    code = hmac.new(secret, content, hashlib.sha256).hexdigest()[:32]
    return f"<<<{name} {code}>>>\n{neutral(text)}\n<<<end {name} {code}>>>"


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """One prompt file. ``fields`` are the variables that it uses, ``blocks`` those of system and user that it has."""

    source: str
    hash: str
    fields: frozenset[str]
    blocks: tuple[str, ...]
    template: Template

    def render(self, **values: object) -> dict[str, str]:
        """The text of each block (of `system` for a file without blocks); ConfigError where the file is wrong."""
        try:
            if not self.blocks:
                return {"system": well_formed(self.template.render(values)).strip()}
            context = self.template.new_context(values)
            return {name: well_formed("".join(self.template.blocks[name](context))).strip() for name in self.blocks}
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
            raise ConfigError(f"{self.source}: {one_line(f'{type(error).__name__}: {error}')}") from error

    def messages(self, **values: object) -> tuple[Message, ...]:
        """The chat that the file stands for: system, then user, without empty ones."""
        texts = self.render(**values)
        return tuple({"role": role, "content": texts[role]} for role in BLOCKS if texts.get(role))


def load_prompt(name: str | Path, fields: Collection[str] | None = None) -> Prompt:
    """The prompt of a name or a file. ``fields``: the variables that its user fills; any other is an error."""
    path = resources.find("prompts", name)
    prompt = _compile(str(path), resources.read_text(path))
    if fields is not None and (unknown := sorted(prompt.fields - set(fields))):
        raise ConfigError(f"{path}: no variable {unknown[0]!r}; {known(fields, unknown[0])}")
    return prompt


def _compile(source: str, text: str) -> Prompt:
    try:
        tree = ENVIRONMENT.parse(text)
        template = ENVIRONMENT.from_string(text)
    except TemplateSyntaxError as error:
        raise ConfigError(f"{source}: line {error.lineno}: {one_line(error.message)}") from error
    blocks = [block.name for block in tree.find_all(nodes.Block)]
    if strange := sorted(set(blocks) - set(BLOCKS)):
        raise ConfigError(f"{source}: no block {strange[0]!r}; {known(BLOCKS, strange[0])}")
    if blocks and (stray := next((node for node in tree.body if not _silent(node)), None)):
        raise ConfigError(f"{source}: line {stray.lineno}: text outside the blocks system and user is never shown")
    return Prompt(
        source=source,
        hash=resources.digest(text),
        fields=frozenset(meta.find_undeclared_variables(tree) - set(ENVIRONMENT.globals)),
        blocks=tuple(block for block in BLOCKS if block in blocks),
        template=template,
    )


def _silent(node: nodes.Node) -> bool:
    """Whether a node at the top of a file with blocks is a block, or white space between blocks."""
    if isinstance(node, nodes.Output):
        return all(isinstance(part, nodes.TemplateData) and not part.data.strip() for part in node.nodes)
    return isinstance(node, nodes.Block)
