"""Where an output cannot be, or would replace what is read, every script says so in one line, with status 2."""

from pathlib import Path

import pytest
from helpers.repo import REPO
from helpers.warm_start import Job

from bge_accel.evaluation.set_files import files_of_beir
from bge_accel.files.outputs import check_output

ROWS = '{"query": "what is it", "pos": ["it is this"], "neg": ["it is that"]}\n'
OUTPUTS = {
    "finetune.py": "--model_name_or_path MODEL --train_data rows.jsonl --output_dir",
    "mine_hard_negatives.py": "--model_name_or_path MODEL --input_file rows.jsonl --output_file",
    "mine_hard_negatives.py ": "--model_name_or_path MODEL --input_file rows.jsonl --output_file out --save_path",
    "score_with_reranker.py": "--reranker MODEL --input_file rows.jsonl --output_file",
    "mix_models.py": "--model_names_or_paths MODEL MODEL --weights 0.5 0.5 --output_path",
    "encode_corpus.py": "--model_name_or_path MODEL --corpus_data rows.jsonl --output_dir",
    "evaluate_retrieval.py": "--encoder MODEL --corpus_data rows.jsonl --query_data rows.jsonl --output_file",
    "evaluate_retrieval.py ": "--encoder MODEL --corpus_data rows.jsonl --query_data rows.jsonl --save_embedding --save_path",
    "evaluate_retrieval.py  ": "--encoder MODEL --corpus_data rows.jsonl --query_data rows.jsonl --figures_dir",
    "demo.py": "--model_name_or_path MODEL --output_dir",
    "doctor.py": "--model_name_or_path MODEL --train_data rows.jsonl --output_dir out --measure_steps 0 --json",
    "report.py": "--metrics metrics.json --output_file",
    "../data/split_rows.py": "--input_file rows.jsonl --output_dir",
    "../data/build_code_search.py": "--output_dir",
    "../data/build_package_docs.py": "--output_dir",
}


def refused(folder: Path, script: str, args: list[str]) -> str:
    before = sorted(folder.rglob("*"))
    out = folder.parent / f"said-{Job.count}"
    Job(*args, cwd=folder, script=REPO / "scripts" / script.strip(), output=out).ends(2)
    said = out.read_text().removesuffix(f"(run {Path(script.strip()).name} --help for every flag)\n")
    assert said.count("\n") == 1 and "error: " in said, said
    assert sorted(folder.rglob("*")) == before
    return said


@pytest.mark.parametrize("script", OUTPUTS)
def test_outputs_that_cannot_be(tmp_path: Path, tiny_model: str, script: str) -> None:
    folder = tmp_path / "here"
    folder.mkdir()
    (folder / "rows.jsonl").write_text(ROWS)
    args = OUTPUTS[script].replace("MODEL", tiny_model).split()
    flag = args[-1] if script != "mix_models.py" else "the output"
    assert flag in refused(folder, script, [*args, ""])
    said = refused(folder, script, [*args, "rows.jsonl/out/below"])
    assert "rows.jsonl cannot be written to; name another folder" in said or "is a file; name a folder" in said


def test_a_report_does_not_replace_what_it_reads(tmp_path: Path) -> None:
    for name in ("train_log.jsonl", "run_config.yaml"):
        (tmp_path / name).write_text("{}")
    for name in ("train_log.jsonl", "run_config.yaml"):
        assert "is an input" in refused(tmp_path, "report.py", ["--run", ".", "--output_file", name])


def test_the_doctor_does_not_replace_the_rows(tmp_path: Path, tiny_model: str) -> None:
    (tmp_path / "rows.jsonl").write_text(ROWS)
    args = OUTPUTS["doctor.py"].replace("MODEL", tiny_model).split()
    assert "rows.jsonl is an input" in refused(tmp_path, "doctor.py", [*args, "rows.jsonl"])


@pytest.mark.parametrize(
    "script, args",
    [
        ("mine_hard_negatives.py", "--model_name_or_path MODEL --input_file data --output_file data/mined.jsonl"),
        ("mine_hard_negatives.py", "--model_name_or_path MODEL --input_file data/*.jsonl --output_file data/mined.jsonl"),
        ("mine_hard_negatives.py", "--model_name_or_path MODEL --input_file data/rows.jsonl --output_file other/mined.jsonl "
         "--candidate_pool other"),
        ("mine_hard_negatives.py", "--model_name_or_path MODEL --input_file data --output_file out --save_path data"),
        ("score_with_reranker.py", "--reranker MODEL --input_file data --output_file data/scored.jsonl"),
        ("encode_corpus.py", "--model_name_or_path MODEL --corpus_data data --output_dir data"),
        ("encode_corpus.py", "--model_name_or_path MODEL --corpus_data * --output_dir store"),
        ("evaluate_retrieval.py", "--encoder MODEL --corpus_data data --query_data q.jsonl --output_file data/m.json"),
        ("evaluate_retrieval.py", "--encoder MODEL --corpus_data q.jsonl --query_data data/ --output_file ./data/m.json"),
        ("evaluate_retrieval.py", "--encoder MODEL --corpus_data data --query_data q.jsonl --save_ranking data/r.jsonl"),
        ("evaluate_retrieval.py", "--encoder MODEL --corpus_data data --query_data q.jsonl --output_file data/rows.jsonl"),
        ("evaluate_retrieval.py", "--encoder MODEL --corpus_data data --query_data q.jsonl --save_embedding "
         "--save_path data"),
        ("evaluate_retrieval.py", "--encoder MODEL --corpus_data beir --output_file beir/corpus.jsonl"),
        ("mix_models.py", "--model_names_or_paths MODEL MODEL --example_data data --output_path data "
         "--overwrite_output_dir"),
        ("mix_models.py", "--model_names_or_paths MODEL MODEL --example_data * --output_path new"),
        ("doctor.py", "--model_name_or_path MODEL --train_data data --output_dir out --measure_steps 0 --json data/d.json"),
        ("../data/split_rows.py", "--input_file data --output_dir data"),
    ],
)  # fmt: skip
def test_outputs_that_would_be_read_as_data(tmp_path: Path, tiny_model: str, script: str, args: str) -> None:
    folder = tmp_path / "here"
    for name in ("data/rows.jsonl", "other/rows.jsonl", "q.jsonl", "beir/corpus.jsonl", "beir/queries.jsonl"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(ROWS)
    (folder / "beir" / "qrels").mkdir()
    (folder / "beir" / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n0\t0\t1\n")
    said = refused(folder, script, args.replace("MODEL", tiny_model).split())
    assert "would read it as data, from" in said or "is an input" in said or "which is read" in said


def test_outputs_beside_what_is_read(tmp_path: Path) -> None:
    for name in ("data/rows.jsonl", "beir/corpus.jsonl", "beir/queries.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(ROWS)
    data, beir = str(tmp_path / "data"), str(tmp_path / "beir")
    for output, inputs in (
        (f"{data}/mined.jsonl", [f"{data}/rows.jsonl"]),
        (f"{data}/mined.jsonl", [f"{data}/row*.jsonl"]),
        (f"{data}/run.trec", [data]),  # no file of data by its name
        (f"{data}/below/mined.jsonl", [data]),
        (f"{data}/below/mined.jsonl", [f"{data}/*.jsonl"]),
        (f"{data}.jsonl", [data]),
        (f"{beir}/metrics.json", files_of_beir([beir])),
        ("metrics.json", ["BeIR/scifact", "", "a\0b"]),  # names on the hub
    ):
        check_output("--output_file", output, inputs)
