"""Install a wheel as users do, and use it (``make dist``).

python tests/installed.py dist/quantkit_w8a8-0.1.0-py3-none-any.whl

A new environment gets the wheel, first by itself and then with the extra ``transformers``. What is run there is run in a folder
outside of the source, so that nothing but the wheel can answer: the README's examples, every command, and ``mypy --strict`` on
programs that import the package. The wheel's description, which is its page on PyPI, may link to nothing that is not there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from email import message_from_bytes
from pathlib import Path

from helpers import TEXT, llama, quantized, write_llama
from pages import README, ROOT, examples, links
from test_typed import write_code_of_users

import quantkit

WITHOUT_EXTRAS = ("quantize float -o no", "inspect model.gguf", "eval int8 -t text.txt", "export int8 -o no", "demo")
"""Commands that need more than the base installation has."""
WITH_TRANSFORMERS = ("inspect model.gguf", "demo")
"""Those that need more than the extra ``transformers`` has."""


def main() -> None:
    wheel, start = Path(sys.argv[1]).resolve(), time.monotonic()
    check_description(wheel)
    with tempfile.TemporaryDirectory() as place:
        site = Site(Path(place))
        site.pip(str(wheel))
        where = site.python("-W", "error", "-c", "import quantkit; print(quantkit.__file__)")
        assert where.startswith(str(site.env)), f"{where} is not what was installed"
        version = site.quantkit("--version").strip()
        assert f"-{version}-" in wheel.name, version
        site.runs({name: code for name, code in examples(README).items() if "from transformers" not in code})
        site.refuses(WITHOUT_EXTRAS)
        print(f"{time.monotonic() - start:.0f} s: {version} works by itself", flush=True)

        site.pip(f"{wheel}[transformers]", "mypy")
        site.runs(examples(README))
        site.refuses(WITH_TRANSFORMERS)
        cycle(site)
        site.python(*write_code_of_users(site.work))
        print(f"{time.monotonic() - start:.0f} s: it works with transformers, and is typed")


def check_description(wheel: Path) -> None:
    """Every link and picture on the page says where it is."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        text = message_from_bytes(archive.read(name)).get_payload()
    assert isinstance(text, str)
    found = links(text)
    relative = [target for target in found if not target.startswith("https://")]
    assert len(found) > 10, f"{wheel.name} has no description"
    assert not relative, f"on PyPI these lead nowhere: {relative}"


class Site:
    """A new environment, and a folder to work in: a small Llama in ``float``, its checkpoint in ``int8``, and a text."""

    def __init__(self, place: Path) -> None:
        self.env, self.work = place / "env", place / "work"
        self.work.mkdir()
        write_llama(self.work / "float")
        quantkit.save(quantized(llama(), "rtn"), self.work / "int8")
        (self.work / "text.txt").write_text(TEXT, encoding="utf-8")
        subprocess.run([sys.executable, "-m", "venv", self.env], check=True)

    def pip(self, *what: str) -> None:
        command = [self.env / "bin" / "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*command, "-c", ROOT / "constraints.txt", *what], check=True)

    def called(self, *command: str) -> subprocess.CompletedProcess[str]:
        """A program of the environment, as it ran in the working folder."""
        clean = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
        command = (str(self.env / "bin" / command[0]), *command[1:])
        return subprocess.run(
            command, cwd=self.work, env=clean | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=False
        )

    def output(self, *command: str) -> str:
        done = self.called(*command)
        assert done.returncode == 0, f"{' '.join(command)} ended with {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    def python(self, *arguments: str) -> str:
        return self.output("python", *arguments)

    def quantkit(self, *arguments: str) -> str:
        return self.output("quantkit", *arguments)

    def runs(self, programs: dict[str, str]) -> None:
        assert programs
        for name, code in programs.items():
            (self.work / f"{name}.py").write_text(f"path = 'float'\n{code}", encoding="utf-8")
            self.python(f"{name}.py")

    def refuses(self, commands: tuple[str, ...]) -> None:
        """Each ends in one line that says what to install."""
        for command in commands:
            done = self.called("quantkit", *command.split())
            said = (done.returncode, done.stdout, done.stderr.count("\n"), "pip install" in done.stderr)
            assert said == (1, "", 1, True), f"quantkit {command}: {done.stdout}{done.stderr}"


def cycle(site: Site) -> None:
    """From a float model to an export, by the command line alone, and back into Python."""
    site.quantkit("quantize", "float", "-o", "made", "-c", "text.txt")
    layers = json.loads(site.quantkit("inspect", "made", "--json"))["layers"]
    assert sum(layer["kind"] == "int8" for layer in layers) == 14
    site.quantkit("export", "made", "-o", "exported")
    for folder in ("made", "exported"):
        options = ["-t", "text.txt", "-r", "float", "--length", "32", "--json"]
        assert json.loads(site.quantkit("eval", folder, *options))["kl"] < 0.01
    site.python("-c", "import quantkit; quantkit.load('made'); quantkit.load('exported')")


if __name__ == "__main__":
    main()
