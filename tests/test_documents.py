"""The READMEs and docs/: every command has flags that exist and, where it can, runs; every link leads somewhere."""

import ast
import contextlib
import functools
import importlib
import importlib.util
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

import pytest
from helpers.models import build_tiny_model
from helpers.repo import REPO
from helpers.runs import write_rows
from helpers.script_files import SCRIPTS, load_script
from helpers.warm_start import Job

from bge_accel.config import parse_config

NAMES = "README*.md CHANGELOG.md SECURITY.md CONTRIBUTING.md docs/*.md data/README.md configs/*/README.md scripts/*/README.md"
DOCUMENTS = sorted(path for pattern in NAMES.split() for path in REPO.glob(pattern))
# Flags in the text that are neither the scripts' nor a launcher's.
FOREIGN_FLAGS = {
    *"nodes time signal requeue mem".split(),  # sbatch and scancel
    *"merge-base no-deps repo-type local-dir".split(),
}

# The fields of FlagEmbedding 1.4.2's evaluation arguments.
FLAG_EMBEDDING_EVALUATION = """
    eval_name dataset_dir force_redownload dataset_names splits corpus_embd_save_dir output_dir search_top_k rerank_top_k
    cache_path token overwrite ignore_identical_ids k_values eval_output_method eval_output_path eval_metrics
    embedder_name_or_path embedder_model_class normalize_embeddings pooling_method use_fp16 devices
    query_instruction_for_retrieval query_instruction_format_for_retrieval examples_for_task examples_instruction_format
    trust_remote_code reranker_name_or_path reranker_model_class reranker_peft_path use_bf16 query_instruction_for_rerank
    query_instruction_format_for_rerank passage_instruction_for_rerank passage_instruction_format_for_rerank cache_dir
    domain_for_pseudo_moe embedder_batch_size reranker_batch_size embedder_query_max_length embedder_passage_max_length
    truncate_dim reranker_query_max_length reranker_max_length normalize prompt cutoff_layers compress_ratio
    compress_layers
""".split()
FOREIGN_FLAGS |= set(FLAG_EMBEDDING_EVALUATION)


class Block(NamedTuple):
    language: str
    text: str
    line: int
    """Of its first line in the document, from 1."""


class Command(NamedTuple):
    document: Path
    line: int
    words: list[str]

    @property
    def place(self) -> str:
        return f"{self.document.relative_to(REPO)}:{self.line}: {shlex.join(self.words)[:120]}"


def outside_blocks(text: str) -> str:
    """The document with its fenced blocks emptied, lines kept."""
    return re.sub(r"^```.*?^```$", lambda found: "\n" * found[0].count("\n"), text, flags=re.MULTILINE | re.DOTALL)


@functools.cache
def read_blocks(path: Path) -> list[Block]:
    text = path.read_text(encoding="utf-8")
    fenced = re.finditer(r"^```(\S*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    blocks = [Block(m[1], m[2], text.count("\n", 0, m.start(2)) + 1) for m in fenced]
    indented = re.finditer(r"^    (python .+\n)", outside_blocks(text), re.MULTILINE)
    blocks += [Block("bash", m[1], text.count("\n", 0, m.start()) + 1) for m in indented]
    return blocks


def read_commands(path: Path) -> list[Command]:
    commands = []
    for block in read_blocks(path):
        if block.language not in ("bash", "sh", "shell"):
            continue
        line = block.line
        for text in re.split(r"(?<!\\)\n", block.text):
            for words in split_at(shlex.split(text.replace("\\\n", " "), comments=True), "&&"):
                while words and re.match(r"[A-Z_]+=", words[0]):
                    words = words[1:]
                if words:
                    commands.append(Command(path, line, words))
            line += text.count("\n") + 1
    return commands


def split_at(words: list[str], mark: str) -> Iterator[list[str]]:
    part: list[str] = []
    for word in [*words, mark]:
        if word == mark:
            yield part
            part = []
        else:
            part.append(word)


COMMANDS = [command for path in DOCUMENTS for command in read_commands(path)]


# ---- flags


def flag_names(path: Path) -> set[str]:
    """Names that a script takes or refuses, without their dashes."""
    if "argparse.ArgumentParser(" in (text := path.read_text(encoding="utf-8")):
        return {"help", *re.findall(r'add_argument\(\s*"--([\w-]+)"', text)}
    module = load_script(path)
    names = {"config", "help", *getattr(module, "REFUSED", {})}
    for field in module.Config.__dataclass_fields__.values() if hasattr(module, "Config") else ():
        for name in (field.name, *field.metadata["aliases"]):
            names |= {name, f"no_{name}"}
    return names | {name.replace("_", "-") for name in names}


@functools.cache
def launcher_flags(launcher: str) -> set[str]:
    if launcher == "torchrun":
        from torch.distributed.run import get_args_parser

        parser = get_args_parser()
    else:
        from accelerate.commands.launch import launch_command_parser

        parser = launch_command_parser()
    return {option.lstrip("-") for action in parser._actions for option in action.option_strings}


def flags_of(words: list[str]) -> list[str]:
    return [word[2:].split("=")[0] for word in words if word.startswith("--")]


def find_script(command: Command) -> tuple[Path, int] | None:
    """The script that a command starts, and where its arguments begin."""
    if command.words[0] not in ("python", "torchrun", "accelerate", "sbatch"):
        return None
    for place, word in enumerate(command.words):
        if word == "my_finetune.py":  # the copy that docs/fork.md makes
            return REPO / "scripts" / "finetune.py", place + 1
        if word.endswith(".py") and "/" in word:
            return REPO / word, place + 1
        if word.endswith(".sbatch"):
            path = REPO / word
            assert path.exists(), f"{command.place}: there is no {word}"
            started = {"finetune": "finetune", "mine": "mine_hard_negatives", "evaluate": "evaluate_retrieval"}
            return REPO / "scripts" / f"{started[path.stem.split('_')[0]]}.py", place + 1
    return None


def check_command(command: Command) -> str | None:
    """What is wrong with a command, or None."""
    words = command.words
    if words[0] == "make":
        targets = set(re.findall(r"^([\w-]+):", (REPO / "Makefile").read_text(), re.MULTILINE))
        wrong = [word for word in words[1:] if "=" not in word and word not in targets]
        return f"the Makefile has no {wrong[0]}" if wrong else None
    found = find_script(command)
    if found is None:
        if words[0] in ("pip", "hf", "cp", "git", "patch", "scontrol", "scancel", "cat", "tail", "grep", "export"):
            missing = [word for word in words if re.fullmatch(r"[\w/.-]*\.(txt|toml|sbatch)", word)]
            missing = [word for word in missing if not (REPO / word).exists()]
            return f"there is no {missing[0]}" if missing else None
        if words[:3] == ["python", "-m", "venv"]:
            return None
        if words[:3] == ["python", "-m", "pytest"] or words[0] == "pytest":
            missing = [word for word in words if word.startswith("tests/") and not (REPO / word).exists()]
            return f"there is no {missing[0]}" if missing else None
        return f"{words[0]} is no command that is known here"
    script, start = found
    if not script.exists():
        return f"there is no {script.relative_to(REPO)}"
    before, arguments = words[:start], [word for word in words[start:] if word != "..."]
    launcher = "torchrun" if words[0] == "torchrun" else "accelerate" if words[0] == "accelerate" else ""
    if launcher:
        unknown = [flag for flag in flags_of(before) if flag not in launcher_flags(launcher)]
        if unknown:
            return f"{launcher} has no flag --{unknown[0]}"
        for place, word in enumerate(before):
            if word == "--config_file" and not (REPO / before[place + 1]).exists():
                return f"there is no {before[place + 1]}"
    known = flag_names(script)
    unknown = [flag for flag in flags_of(arguments) if flag not in known]
    if unknown:
        return f"{script.name} has no flag --{unknown[0]}"
    whole = "..." not in words and "--config" not in words and hasattr(load_script(script), "Config")
    if whole and "argparse.ArgumentParser(" not in script.read_text(encoding="utf-8"):
        module, said = load_script(script), io.StringIO()
        try:
            with contextlib.redirect_stderr(said):
                parse_config(module.Config, arguments, refused=getattr(module, "REFUSED", None))
        except SystemExit:
            return said.getvalue().splitlines()[0]
    return None


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(REPO)))
def test_commands_have_flags_that_exist(path: Path) -> None:
    wrong = [f"{command.place}\n    {fault}" for command in read_commands(path) if (fault := check_command(command))]
    assert not wrong, "\n" + "\n".join(wrong)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.relative_to(REPO)))
def test_commands_of_docstrings_have_flags_that_exist(path: Path) -> None:
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    commands = re.findall(
        r"^ *((?:python|torchrun|accelerate|sbatch) .*?(?<!\\))$", docstring, re.MULTILINE | re.DOTALL
    )
    wrong = []
    for text in commands:
        for words in split_at(shlex.split(text.replace("\\\n", " "), comments=True), "&&"):
            command = Command(path, 1, words)
            if words[0].endswith("/pip") or not (fault := check_command(command)):
                continue
            wrong.append(f"{command.place}\n    {fault}")
    assert not wrong, "\n" + "\n".join(wrong)
    assert commands, f"{path.relative_to(REPO)}: its docstring shows no command"


def test_a_wrong_command_is_found() -> None:
    def fault(text: str) -> str:
        return check_command(Command(REPO / "README.md", 1, shlex.split(text))) or ""

    assert "has no flag --learning_rat" in fault("python scripts/finetune.py ... --learning_rat 1")
    assert "'x' is not a number" in fault(
        "python scripts/finetune.py --model_name_or_path m --train_data t --output_dir o --learning_rate x"
    )
    assert "missing: --train_data" in fault("python scripts/finetune.py --model_name_or_path m --output_dir o")
    assert "not available" in fault(
        "python scripts/finetune.py --model_name_or_path m --train_data t --output_dir o --use_lora True"
    )
    assert "there is no scripts/nothing.py" in fault("python scripts/nothing.py --k 1")
    assert "accelerate has no flag --proceses" in fault("accelerate launch --proceses 2 scripts/finetune.py ...")
    assert "there is no configs/x.yaml" in fault(
        "accelerate launch --config_file configs/x.yaml scripts/finetune.py ..."
    )
    assert "the Makefile has no demos" in fault("make demos")
    assert "evaluate_retrieval.py has no flag --kk" in fault("sbatch scripts/slurm/evaluate.sbatch --kk 1")
    assert not fault("torchrun --nproc_per_node 2 scripts/finetune.py ... --no_mask_false_negatives")


def test_flags_in_the_text_exist() -> None:
    scripts = [*REPO.glob("scripts/*.py"), *REPO.glob("scripts/benchmarks/*.py"), *REPO.glob("data/*.py")]
    known = set.union(
        *map(flag_names, scripts), launcher_flags("torchrun"), launcher_flags("accelerate"), FOREIGN_FLAGS
    )
    wrong = []
    for path in DOCUMENTS:
        for number, line in enumerate(outside_blocks(path.read_text(encoding="utf-8")).splitlines(), start=1):
            found = [flag for code in re.findall(r"`[^`]+`", line) for flag in re.findall(r"--([A-Za-z][\w-]*)", code)]
            wrong += [f"{path.relative_to(REPO)}:{number}: --{flag}" for flag in found if flag not in known]
    assert not wrong, "\n" + "\n".join(wrong)


# ---- FlagEmbedding


# The fields of the argument classes of FlagEmbedding 1.4.2 (embedders: abc, m3, decoder_only), beside transformers' own.
FLAG_EMBEDDING = """
    model_name_or_path config_name tokenizer_name cache_dir trust_remote_code use_fast_tokenizer token train_data cache_path
    train_group_size query_max_len passage_max_len pad_to_multiple_of max_example_num_per_dataset
    query_instruction_for_retrieval query_instruction_format knowledge_distillation passage_instruction_for_retrieval
    passage_instruction_format shuffle_ratio same_dataset_within_batch small_threshold drop_threshold
    negatives_cross_device temperature fix_position_embedding sentence_pooling_method normalize_embeddings sub_batch_size
    kd_loss_type use_mrl mrl_dims normlized use_inbatch_neg
    colbert_dim unified_finetuning use_self_distill fix_encoder self_distill_start_step
    peft_model_path use_lora lora_rank lora_alpha lora_dropout target_modules use_flash_attn use_slow_tokenizer
    additional_special_tokens save_merged_lora_model only_merge_lora_model raw_peft from_peft modules_to_save
    save_lora_embeddings load_merged_lora_model
    example_query_max_len example_passage_max_len retrieval_use_examples icl_suffix_str
""".split()


@pytest.mark.parametrize("name", ["README.md", "README.zh-CN.md"])
def test_every_flag_of_flagembedding_is_accounted_for(name: str) -> None:
    text = (REPO / name).read_text(encoding="utf-8")
    known = flag_names(REPO / "scripts" / "finetune.py")
    mentioned = set(re.findall(r"--(\w+)", text))
    assert [flag for flag in FLAG_EMBEDDING if flag not in known or flag not in mentioned] == []
    assert [flag for flag in FLAG_EMBEDDING_EVALUATION if flag not in mentioned] == []
    refused = load_script(REPO / "scripts" / "finetune.py").REFUSED
    for row in re.findall(r"^\| (`--.*?) \| (?:refused|不接受)", text, re.MULTILINE):
        assert [flag for flag in re.findall(r"--(\w+)", row) if flag not in refused] == []


# ---- two languages


def headings(text: str) -> list[tuple[int, str]]:
    return [(len(m[1]), m[2]) for m in re.finditer(r"^(#+) (.+)$", outside_blocks(text), re.MULTILINE)]


def tables(text: str) -> list[tuple[int, int]]:
    """(rows, columns) of each table."""
    found = re.findall(r"(?:^\|.*\n)+", outside_blocks(text), re.MULTILINE)
    return [(table.count("\n"), len(re.findall(r"(?<!\\)\|", table.splitlines()[0])) - 1) for table in found]


def test_both_languages_say_the_same() -> None:
    english, chinese = ((REPO / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh-CN.md"))
    blocks = [[block[:2] for block in read_blocks(REPO / name)] for name in ("README.md", "README.zh-CN.md")]
    assert blocks[0] == blocks[1] and len(blocks[0]) >= 9
    assert [level for level, _ in headings(english)] == [level for level, _ in headings(chinese)]
    assert tables(english) == tables(chinese) and len(tables(english)) >= 8
    assert "(README.zh-CN.md)" in english.split("\n## ")[0] and "(README.md)" in chinese.split("\n## ")[0]
    # The same figures, flags and links.
    for pattern in (r"\d[\d,.]*\d|\d", r"--\w+", r"\]\(([^)#]+)"):
        counts = [Counter(re.findall(pattern, outside_blocks(text))) for text in (english, chinese)]
        for count in counts:  # each names the other
            for name in ("README.md", "README.zh-CN.md"):
                count.pop(name, None)
        assert counts[0] == counts[1], (counts[0] - counts[1], counts[1] - counts[0])


# ---- links


def slugs(text: str) -> set[str]:
    """Anchors of the headings, as GitHub makes them."""
    found: Counter = Counter()
    names = set()
    for _, heading in headings(text):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        names.add(f"{slug}-{found[slug]}" if found[slug] else slug)
        found[slug] += 1
    return names


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(REPO)))
def test_links_lead_somewhere(path: Path) -> None:
    text = outside_blocks(path.read_text(encoding="utf-8"))
    wrong = []
    for found in re.finditer(r"\[[^\]]*\]\(([^)\s]+)\)", text):
        target = unquote(found[1])
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        exists = file.exists() and file.is_relative_to(REPO)
        if exists and file.is_dir():
            file = file / "README.md"
        if not exists or (anchor and anchor not in slugs(file.read_text(encoding="utf-8"))):
            wrong.append(f"{path.relative_to(REPO)}:{text.count(chr(10), 0, found.start()) + 1}: {found[1]}")
    assert not wrong, "\n" + "\n".join(wrong)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(REPO)))
def test_files_that_are_named_exist(path: Path) -> None:
    text = outside_blocks(path.read_text(encoding="utf-8"))
    named = re.findall(r"(?:scripts|tests|docs|configs|bge_accel)/[\w/.-]+\.(?:py|yaml|md|sbatch|sh|png)\b", text)
    assert [name for name in named if not (REPO / name).exists() and not (REPO / "docs" / name).exists()] == []


# ---- the picture


def test_the_picture_shows_the_table(tmp_path: Path) -> None:
    Image = pytest.importorskip("PIL.Image", reason="matplotlib is not installed")  # noqa: N806
    figure = load_script(REPO / "docs" / "demo_figure.py")
    tasks = figure.read_table((REPO / "README.md").read_text(encoding="utf-8"))
    assert list(tasks) == ["code search", "general task"]
    assert [list(map(len, models.values())) for models in tasks.values()] == [[1, 3, 3], [1, 3, 3]]
    assert tasks["code search"]["tuned"][0] == 0.5612 and tasks["general task"]["merged"][2] == 0.6389
    shown = json.loads(Image.open(REPO / "docs" / "demo.png").text["Description"])
    assert shown == tasks, "docs/demo.png is of another table: python docs/demo_figure.py"
    figure.draw(tasks, tmp_path / "demo.png")
    assert Image.open(tmp_path / "demo.png").size[0] > 900


# ---- messages


def spoken_texts() -> str:
    """All strings of the scripts and the library, as they would be printed, with a blank mark for each value."""
    found = []
    for path in [*REPO.glob("scripts/*.py"), *REPO.glob("bge_accel/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n\n".join(found).replace("\0", "…")


def test_messages_are_the_programs_own_words() -> None:
    """What a table headed `message` quotes is said somewhere; of `you see`, other programs may say it."""
    said = spoken_texts()
    text = (REPO / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    tables_of_messages = re.findall(r"^\| message \|.*\n\|.*\n((?:^\|.*\n)+)", text, re.MULTILINE)
    quoted = [re.match(r"\| `(.+?)` \|", row) for table in tables_of_messages for row in table.splitlines()]
    assert len(quoted) > 40 and all(quoted)
    wrong = []
    for match in quoted:
        assert match is not None
        parts = [part.strip() for part in match[1].replace("\\n", "\n").split("…") if len(part.strip()) > 2]
        wrong += [
            f"{match[0]}: {part!r}" for part in parts if part not in said and part.replace("\n", "\\n") not in said
        ]
    assert not wrong, "\n" + "\n".join(wrong)


# ---- Python


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(REPO)))
def test_python_blocks_import_what_exists(path: Path) -> None:
    for block in read_blocks(path):
        if block.language != "python":
            continue
        for node in ast.walk(ast.parse(block.text)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("bge_accel"):
                module = importlib.import_module(node.module or "")
                missing = [name.name for name in node.names if not hasattr(module, name.name)]
                assert not missing, f"{path.relative_to(REPO)}:{block.line}: {node.module} has no {missing[0]}"


# ---- running


NOT_RUN = [
    (r"\.\.\.", "an excerpt"),
    (r"--config run\.yaml", "the reader's own file"),
    (r"--multi_gpu|fsdp2|zero\d|multi_gpu_|multi_node", "GPUs"),
    (r"^(sbatch|scontrol|scancel)", "a cluster"),
    (r"^(pip|hf|git) ", "a network"),
    (r"^(make|pytest|python -m pytest) ", "tested by being used"),
    (r"scripts/benchmarks/", "long"),
    (r"data/build_|scripts/demo\.py|docs/demo_figure\.py|scripts/doctor\.py", "has tests of its own"),
    (r"msmarco|billion\.run", "large files"),
    (r"^patch ", "tests/test_fork.py"),
]  # fmt: skip
SMALL = {
    "finetune.py": "--max_steps 2 --per_device_train_batch_size 4 --logging_steps 1 --passage_max_len 64 --eval_steps 2",
    "mine_hard_negatives.py": "--max_length 64",
    "encode_corpus.py": "--max_length 64",
    "evaluate_retrieval.py": "--max_query_length 128",  # the tiny tokenizer cuts an instruction into letters
    "score_with_reranker.py": "--reranker_max_length 64",
}  # fmt: skip
PRELUDE = """
import numpy as np
texts, queries = ["a king and a princess", "return the list"], ["who is king"]
"""


def is_run(command: Command) -> bool:
    text = shlex.join(command.words)
    return not any(re.search(pattern, text) for pattern, _ in NOT_RUN)


@pytest.fixture(scope="module")
def base_model(tmp_path_factory: pytest.TempPathFactory, tiny_model: str) -> str:
    """The tiny model in a folder that says how it pools, as models of the hub do."""
    from bge_accel.models.encoder import load_encoder, save_encoder

    folder = str(tmp_path_factory.mktemp("models") / "base")
    save_encoder(folder, *load_encoder(tiny_model))
    return folder


@pytest.fixture(scope="module")
def tuned_model(tmp_path_factory: pytest.TempPathFactory, base_model: str) -> Path:
    """What a run leaves, with five checkpoints."""
    where = tmp_path_factory.mktemp("run")
    rows = write_rows(where / "train.jsonl", 16)
    command = [
        *(sys.executable, REPO / "scripts" / "finetune.py", "--model_name_or_path", base_model, "--train_data", rows),
        *("--output_dir", where / "tuned", "--max_steps", 6, "--save_steps", 1, "--logging_steps", 1),
        *("--per_device_train_batch_size", 4),
    ]
    run_block(list(map(str, command)), where, "the run before the document")
    return where / "tuned"


@pytest.fixture
def workbench(tmp_path: Path) -> Path:
    """A folder that looks like the repository to a command, with small files under the names of the documents."""
    for name in ("scripts", "configs", "bge_accel"):
        (tmp_path / name).symlink_to(REPO / name)
    rows = [json.loads(line) for line in open(write_rows(tmp_path / "train.jsonl", 16), encoding="utf-8")]
    for name in ("mined.jsonl", "dev.jsonl", "rows.jsonl"):
        shutil.copy(tmp_path / "train.jsonl", tmp_path / name)
    write_rows(tmp_path / "my_rows.jsonl", 450)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "split_rows.py").symlink_to(REPO / "data" / "split_rows.py")
    texts = dict.fromkeys(text for row in rows for text in [*row["pos"], *row["neg"]])
    ids = {text: f"d{number}" for number, text in enumerate(texts)}
    corpus = [{"id": number, "content": text} for text, number in ids.items()]
    queries = [{"id": f"q{i}", "query": row["query"], "positive": row["pos"]} for i, row in enumerate(rows)]
    judged = [f"q{i}\t{ids[text]}\t1" for i, row in enumerate(rows) for text in row["pos"]]
    beir = [
        ("corpus.jsonl", [{"_id": row["id"], "text": row["content"]} for row in corpus]),
        ("queries.jsonl", [{"_id": row["id"], "text": row["query"]} for row in queries]),
    ]

    def write(path: Path, lines: list) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))

    qrels = ["query-id\tcorpus-id\tscore", *judged]
    for folder in ("", "data/code_search", "dev", "general"):
        write(tmp_path / folder / "corpus.jsonl", corpus)
        write(tmp_path / folder / "queries.jsonl", queries)
        write(tmp_path / folder / "qrels.tsv", qrels)
    write(tmp_path / "data" / "code_search" / "train.jsonl", rows)
    write(tmp_path / "dev_queries.jsonl", queries)
    write(tmp_path / "dev_qrels.tsv", qrels)
    for folder in ("scifact", "fairytaleqa"):
        for name, lines in beir:
            write(tmp_path / folder / name, lines)
        write(tmp_path / folder / "qrels" / "test.tsv", qrels)
    write(tmp_path / "any.run", [f"q{i} Q0 d{i} 1 0.5 any" for i in range(len(rows))])
    for seed, name in enumerate(("tuned-a", "tuned-b"), start=1):
        build_tiny_model(tmp_path / name, seed=seed)
    return tmp_path


def local(text: str, model: str, reranker: str) -> str:
    text = re.sub(r"BAAI/bge-reranker[\w.-]*", reranker, text)
    return re.sub(r"BAAI/bge-[\w.-]+|\bMODEL\b", model, text)


def run_block(block: list[str], where: Path, place: str, cold: bool = False) -> None:
    """Runs a command; one of Python with the packages imported already, unless `cold`."""
    if not cold and block[0] == sys.executable and block[1].endswith(".py"):
        job = Job(*block[2:], cwd=where, script=Path(block[1]), env={"PYTHONPATH": ""})
        assert job.wait(timeout=300) == [0], f"{place}\n{job.text[-6000:]}"
        return
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(block, cwd=where, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, f"{place}\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}"


def run_document(path: Path, where: Path, model: str, reranker: str, cold: bool = False) -> int:
    """Runs what can be run of a document, from top to bottom; returns how many commands and programs that were."""
    ran = 0
    parts: list[tuple[int, Command | Block]] = [(command.line, command) for command in read_commands(path)]
    parts += [(block.line, block) for block in read_blocks(path) if block.language == "python"]
    for line, part in sorted(parts, key=lambda part: part[0]):
        place = f"{path.relative_to(REPO)}:{line}"
        if isinstance(part, Block):
            if re.search(r"(?<![\"\w:])\s\.\.\.|\[\.\.\.|\"\.\.\.\"|mteb|in folders", part.text):
                continue
            shutil.rmtree(where / "embeddings", ignore_errors=True)  # of other texts
            (where / "block.py").write_text(PRELUDE + local(part.text, model, reranker), encoding="utf-8")
            run_block([sys.executable, "block.py"], where, place, cold)
        elif is_run(part):
            words = [local(word, model, reranker) for word in part.words]
            if words[0] == "python":
                words[0] = sys.executable
            elif words[0] == "torchrun":
                text = re.sub(r"--nproc_per_node \d+", "--standalone --nproc_per_node 2", shlex.join(words[1:]))
                words = [sys.executable, "-m", "torch.distributed.run", *shlex.split(text)]
            found = find_script(part)
            if found:
                words += SMALL.get(found[0].name, "").split()
            for flag in ("--output_path", "--output_dir"):  # the documents use a name more than once
                if flag in words and found and found[0].name in ("mix_models.py", "finetune.py"):
                    shutil.rmtree(where / words[words.index(flag) + 1], ignore_errors=True)
            run_block(words, where, place, cold)
        else:
            continue
        ran += 1
    return ran


def test_the_readme_runs(workbench: Path, base_model: str, tiny_reranker: str) -> None:
    ran = run_document(REPO / "README.md", workbench, base_model, tiny_reranker, cold=True)
    assert ran == 7  # split, mine, tune, merge, evaluate, report; the program
    assert (workbench / "comparison.html").exists() and (workbench / "report.html").exists()
    assert set(json.loads((workbench / "metrics.json").read_text())["systems"]) >= {"tuned", "merged"}


@pytest.mark.slow
@pytest.mark.parametrize("name", [path.name for path in DOCUMENTS if path.parent.name == "docs"])
def test_the_documents_run(name: str, workbench: Path, base_model: str, tuned_model: Path, tiny_reranker: str) -> None:
    shutil.copytree(tuned_model, workbench / "tuned")
    expected = sum(map(is_run, read_commands(REPO / "docs" / name)))
    ran = run_document(REPO / "docs" / name, workbench, base_model, tiny_reranker)
    assert ran >= expected


def test_most_commands_run() -> None:
    """What is only parsed is the exception, and each has its reason."""
    scripts = [command for command in COMMANDS if command.words[0] == "python" and find_script(command)]
    assert sum(map(is_run, scripts)) >= 20
