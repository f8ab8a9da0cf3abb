"""What must hold of the repository as a whole."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"llm2clip": ROOT / "llm2clip", "llava_bridge": ROOT / "llava_bridge", "llm2clip_eval": ROOT / "eval"}
MAY_IMPORT = {
    "llm2clip": {"llm2clip"},
    "llava_bridge": {"llava_bridge", "llm2clip"},
    "llm2clip_eval": {"llm2clip_eval", "llava_bridge", "llm2clip"},
}
STAGES = {
    "llm2clip": {"finetune_llm", "extract_embeddings", "train_clip", "export"},
    "llava_bridge": {"pretrain", "finetune", "export", "chat", "check"},
}


def imports(path: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_point_one_way(package):
    files = list(PACKAGES[package].rglob("*.py"))
    assert files
    for path in files:
        ours = {name.partition(".")[0] for name in imports(path)} & PACKAGES.keys()
        assert ours <= MAY_IMPORT[package], f"{path} imports {ours - MAY_IMPORT[package]}"


def test_stages_do_not_import_each_other():
    every = {f"{package}.{stage}" for package, stages in STAGES.items() for stage in stages}
    for stage in every:
        assert not imports(ROOT / f"{stage.replace('.', '/')}.py") & (every - {stage})


def test_eval_is_no_package():
    """`import eval` would shadow the builtin."""
    assert not (ROOT / "eval" / "__init__.py").exists()


def test_files_can_be_read_at_a_sitting():
    long = {
        p.name: n for d in PACKAGES.values() for p in d.rglob("*.py") if (n := len(p.read_text().splitlines())) > 400
    }
    assert not long


def test_weights_are_never_unpickled():
    for directory in PACKAGES.values():
        for path in directory.rglob("*.py"):
            for call in re.findall(r"torch\.load\([^)]*\)", path.read_text(encoding="utf-8")):
                assert "weights_only=True" in call, f"{path}: {call}"
            assert "trust_remote_code=True" not in path.read_text(encoding="utf-8")


def commands_of(text: str) -> list[str]:
    return [line.strip() for block in re.findall(r"```bash\n(.*?)```", text, re.S) for line in block.splitlines()]


def test_readme_names_things_that_exist():
    """Every script, config and command in the README's code blocks."""
    from llava_bridge import cli as llava_cli
    from llm2clip import cli
    from llm2clip_eval import cli as eval_cli

    known = {"llm2clip": cli.COMMANDS, "llava-bridge": llava_cli.COMMANDS, "llm2clip-eval": eval_cli.COMMANDS}
    lines = commands_of((ROOT / "README.md").read_text(encoding="utf-8"))
    assert "bash scripts/train_llm2clip.sh" in lines
    assert "bash scripts/test.sh" in lines
    for line in lines:
        for path in re.findall(r"\b(?:scripts|configs)/[\w./-]+", line):
            assert (ROOT / path).exists(), f"README: {path}"
        if found := re.match(r"(llm2clip(?:-eval)?|llava-bridge) ([a-z-]+(?: (?:demo|check|assets))?)", line):
            assert found[2] in known[found[1]], f"README: {line}"


def test_no_registry_hosts_or_machine_paths():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in tracked:
        path = ROOT / name
        if path.suffix in {".py", ".sh", ".md", ".yaml", ".toml", ".txt", ".json"} and path.is_file():
            assert not re.search(r"://(?:pypi|files|registry|deb)\.", path.read_text(encoding="utf-8")), name
