"""Other people's programs (gcloud, kubectl, sbatch): run, or only printed in a dry run."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from tanuki_jax.errors import UserError

INSTALL = {
    "gcloud": "see https://cloud.google.com/sdk/docs/install",
    "kubectl": "gcloud components install kubectl",
    **dict.fromkeys(("sbatch", "squeue", "scancel"), "run this on a login node of the cluster"),
}
TIMED_OUT = 124  # exit code of a command that was stopped at its time limit, as of timeout(1)


@dataclass(frozen=True)
class Completed:
    """What became of a command."""

    code: int
    out: str = ""
    err: str = ""

    @property
    def last_line(self) -> str:
        """What it complained of, in one line: from its last ERROR on, or else its last line."""
        lines = [line.strip() for line in (self.err.strip() or self.out.strip()).splitlines()]
        starts = [number for number, line in enumerate(lines) if line.startswith("ERROR")]
        return " ".join(lines[starts[-1] if starts else -1 :])[:1000] if lines else f"exit code {self.code}"


class Commands:
    """Runs commands; in a dry run prints them as a shell would take them, and each succeeds."""

    def __init__(self, dry_run: bool = False) -> None:
        self.dry_run = dry_run

    def run(self, words: Sequence[str], text: str = "", seconds: float = 300.0) -> Completed:
        """Runs a command to its end and returns what it printed; `text` goes to its input, `seconds` is its limit."""
        if self.dry_run:
            print(f"{shlex.join(words)} <<'EOF'\n{text}EOF" if text else shlex.join(words))
            return Completed(0)
        self._find(words[0])
        try:
            done = subprocess.run(words, input=text, capture_output=True, text=True, timeout=seconds)
        except subprocess.TimeoutExpired as error:
            return Completed(TIMED_OUT, _text(error.stdout), f"{_text(error.stderr)}\nno end in {seconds:.0f} s")
        return Completed(done.returncode, done.stdout, done.stderr)

    def require(self, words: Sequence[str], text: str = "", seconds: float = 300.0) -> Completed:
        """The same, where failure is an error with the command's own words."""
        done = self.run(words, text, seconds)
        if done.code:
            raise UserError(f"launch: {shlex.join(words[:4])} ... failed: {done.err.strip() or done.last_line}")
        return done

    def show(self, words: Sequence[str]) -> None:
        """Runs a command whose output is the answer, on this terminal; an error where it fails."""
        if self.dry_run:
            print(shlex.join(words))
            return
        self._find(words[0])
        if code := subprocess.run(words).returncode:
            raise UserError(f"launch: {shlex.join(words[:4])} ... ended with exit code {code}")

    def _find(self, program: str) -> None:
        if not shutil.which(program):
            raise UserError(f"launch: {program} is not installed; {INSTALL.get(program, 'install it first')}")


def _text(output: str | bytes | None) -> str:
    return output.decode(errors="replace") if isinstance(output, bytes) else output or ""
