"""Scripts with which bash, zsh and fish complete the command line."""

from __future__ import annotations

from shlex import quote
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning_longnet.cli.options import Command


def bash(commands: Sequence[Command]) -> str:
    """Return the script for bash."""
    names = quote(" ".join(each.name for each in commands))
    options, values = [], []
    for command in commands:
        options.append(f"    {command.name}) options={quote(' '.join(each.name for each in command.options))} ;;")
        if command.words:
            values.append(f'    "{command.name} {command.name}") values={quote(" ".join(command.words))} ;;')
        values += [
            f'    "{command.name} {option.name}") values={quote(" ".join(option.values))} ;;'
            for option in command.options
            if option.values
        ]
    # bash cuts --name=value into three words
    return f"""\
# completion of longnet for bash, printed by `longnet completion bash`
_longnet() {{
  local current="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD-1]}}" options= values=
  COMPREPLY=()
  if (( COMP_CWORD == 1 )); then
    COMPREPLY=($(compgen -W {names} -- "$current"))
    return
  fi
  if [[ $current == "=" ]]; then
    current=
  elif [[ $before == "=" ]]; then
    before="${{COMP_WORDS[COMP_CWORD-2]}}"
  fi
  case "${{COMP_WORDS[1]}}" in
{chr(10).join(options)}
  esac
  case "${{COMP_WORDS[1]}} $before" in
{chr(10).join(values)}
  esac
  if [[ -n $values ]]; then
    COMPREPLY=($(compgen -W "$values" -- "$current"))
  elif [[ $current == -* ]]; then
    COMPREPLY=($(compgen -W "$options" -- "$current"))
  else
    compopt -o filenames 2>/dev/null
    local IFS=$'\\n'
    COMPREPLY=($(compgen -f -- "$current"))
  fi
}}
complete -F _longnet longnet
"""


def zsh(commands: Sequence[Command]) -> str:
    """Return the script for zsh."""
    options, values = [], []
    for command in commands:
        shown = " ".join(_described(option.name, option.purpose) for option in command.options)
        options.append(f"    {command.name}) options=({shown}) ;;")
        if command.words:
            values.append(f'    "{command.name} {command.name}") values=({" ".join(map(quote, command.words))}) ;;')
        values += [
            f'    "{command.name} {option.name}") values=({" ".join(map(quote, option.values))}) ;;'
            for option in command.options
            if option.values
        ]
    names = " ".join(_described(each.name, each.purpose) for each in commands)
    return f"""\
#compdef longnet
# completion of longnet for zsh, printed by `longnet completion zsh`
_longnet() {{
  local -a names options values
  if (( CURRENT == 2 )); then
    names=({names})
    _describe command names
    return
  fi
  case $words[2] in
{chr(10).join(options)}
  esac
  case "$words[2] $words[CURRENT-1]" in
{chr(10).join(values)}
  esac
  if (( $#values )); then
    compadd -a values
  elif [[ $PREFIX == -* ]]; then
    _describe -o option options
  else
    _files
  fi
}}
if [[ $funcstack[1] == _longnet ]]; then _longnet "$@"; else compdef _longnet longnet; fi
"""


def fish(commands: Sequence[Command]) -> str:
    """Return the script for fish."""
    lines = ["# completion of longnet for fish, printed by `longnet completion fish`"]
    for command in commands:
        lines.append(f"complete -c longnet -n __fish_use_subcommand -f -a {command.name} -d {_plain(command.purpose)}")
        condition = f"complete -c longnet -n '__fish_seen_subcommand_from {command.name}'"
        if command.words:
            lines.append(f"{condition} -f -a {_plain(' '.join(command.words))}")
        for option in command.options:
            parts = [condition, f"-l {option.name.removeprefix('--')}"]
            parts += [f"-d {_plain(option.purpose)}"] if option.purpose else []
            parts += [f"-x -a {_plain(' '.join(option.values))}"] if option.values else []
            parts += ["-r"] if not option.values and not option.is_switch else []
            lines.append(" ".join(parts))
    return "\n".join(lines) + "\n"


SHELLS = {"bash": bash, "zsh": zsh, "fish": fish}


def _described(name: str, purpose: str) -> str:
    """Return a name and its purpose as zsh's `_describe` reads them, which splits at the first colon."""
    return quote(f"{name}:{purpose}" if purpose else name)


def _plain(text: str) -> str:
    """Return a text in the single quotes of fish, in which a backslash escapes quotes."""
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"
