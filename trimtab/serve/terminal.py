"""`trimtab chat FILE`: a conversation in the terminal, or through a pipe: one line in, one answer out."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from rich.console import Console

from trimtab.config import StageConfig
from trimtab.errors import TrimtabError
from trimtab.registry import nearest
from trimtab.serve.chat import ChatModel
from trimtab.train import progress
from trimtab.types import Message

COMMANDS = {
    "/clear": "forget the conversation",
    "/history": "show it",
    "/system": "/system TEXT sets the system message and starts anew; without TEXT shows it",
    "/exit": "leave (also Ctrl-D); Ctrl-C stops an answer",
}


def chat(config: StageConfig) -> None:
    """Talk until /exit or the end of the input.

    Raises:
        TrimtabError: a model that cannot be loaded, or one that writes no answers.
    """
    before, progress.console.stderr = progress.console.stderr, not sys.stdin.isatty()  # answers alone go to a pipe
    try:
        model = ChatModel(config)
        model.served.generator()  # a reward model is refused before the first question
    finally:
        progress.console.stderr = before
    console = Console(highlight=False)
    watched = sys.stdin.isatty()
    if watched:
        console.print("Ask away. " + "; ".join(f"{name}: {what}" for name, what in COMMANDS.items()), style="dim")
    history: list[Message] = []
    system: str | None = None
    turn = 0
    for line in _lines(console, watched=watched):
        word, _, rest = line.strip().partition(" ")
        if not line.strip():
            continue
        if word == "/exit":
            return
        if word == "/clear":
            history = []
        elif word == "/history":
            for message in history:
                console.print(f"{message.role}: {message.content}", markup=False, soft_wrap=True)
        elif word == "/system":
            if rest.strip():
                system, history = rest.strip(), []
            console.print(f"system: {system or 'the template decides'}", markup=False, soft_wrap=True)
        elif word.startswith("/") and not rest and (guess := nearest(word, COMMANDS)):
            console.print(f"no command {word}; did you mean {guess}?", markup=False)
        else:
            history = _answer(model, console, [*history, Message(role="user", content=line)], system, turn)
            turn += 1


def _answer(model: ChatModel, console: Console, history: list[Message], system: str | None, turn: int) -> list[Message]:
    """Stream the answer to the last message; returns the dialogue with it, or without the question when there is none."""
    text = ""
    try:
        # the turn goes into the seed: asking again draws again
        for piece in model.stream_chat(history, system, seed=model.served.config.seed + turn):
            text += piece
            console.print(piece, end="", markup=False, soft_wrap=True)
    except KeyboardInterrupt:
        console.print(" [stopped]", style="dim", end="", markup=False)
    except TrimtabError as error:
        console.print(f"error: {error}", markup=False, soft_wrap=True, end="")
    console.print()
    return [*history, Message(role="assistant", content=text)] if text else history[:-1]


def _lines(console: Console, *, watched: bool) -> Iterator[str]:
    """What the user types, line by line, to the end of the input; Ctrl-C at the prompt only clears the line."""
    while True:
        try:
            if watched:
                yield console.input("[bold]> [/bold]")
            elif line := sys.stdin.readline():
                yield line.rstrip("\r\n")
            else:
                return
        except EOFError:
            return
        except KeyboardInterrupt:
            if not watched:
                raise
            console.print("\n/exit or Ctrl-D leaves", style="dim")
