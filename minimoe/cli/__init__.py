"""The command line: one program, every option of a config also a flag.

Exit code 0 for success, 2 for what the user can mend (one line says what and how), 1 for anything else.
"""
from __future__ import annotations

import os
import sys
from collections.abc import Callable

from minimoe.cli.chatting import chat
from minimoe.cli.comparing import compare
from minimoe.cli.convert import export, import_folder
from minimoe.cli.data import data
from minimoe.cli.evaluating import evaluate
from minimoe.cli.exploring import explore
from minimoe.cli.staging import stages
from minimoe.cli.training import train
from minimoe.cli.using import doctor, generate, info
from minimoe.launch import let_rank_0_speak
from minimoe.settings import ConfigError
from minimoe.track import colored

COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "train": train, "stages": stages, "compare": compare, "generate": generate, "chat": chat, "evaluate": evaluate,
    "explore": explore, "data": data, "import": import_folder, "export": export, "info": info, "doctor": doctor}


def main(argv: list[str] | None = None) -> int:
    """The program `minimoe`."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print("usage: minimoe COMMAND [OPTIONS]      (minimoe COMMAND --help lists the options)\n")
        for name, command in COMMANDS.items():
            print(f"  {name:<10} {command.__doc__.strip()}")
        return 0
    if argv[0] not in COMMANDS:
        print(f"minimoe: error: unknown command {argv[0]!r}; one of {', '.join(COMMANDS)}", file=sys.stderr)
        return 2
    try:
        COMMANDS[argv[0]](argv[1:])
    except (ConfigError, ValueError) as error:
        let_rank_0_speak()
        print(colored(f"minimoe: error: {error}", "red", sys.stderr), file=sys.stderr)
        return 2
    except BrokenPipeError:                     # minimoe … | head: the reader has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("\nminimoe: stopped", file=sys.stderr)
        return 130
    except Exception as error:
        if not getattr(error, "__notes__", None):           # nobody has written it down: show all of it
            raise
        text = f"minimoe: error: {type(error).__name__}: {error}; {error.__notes__[-1]}"
        print(colored(text, "red", sys.stderr), file=sys.stderr)
        return 1
    return 0
