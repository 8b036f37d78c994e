"""Bad input of `python -m compact.train`: one message says what and where, before anything is trained or written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import BertConfig, BertModel, T5Config, T5Model

from compact.config import from_dict, read_recipe
from compact.errors import UserError
from compact.options import plain
from compact.run_folder import claim
from compact.train import main
from compact.yamlfile import write_file
from tests.toy import toy_tokenizer
from tests.toy_run import toy_rows, write_rows
from tests.train_cases import files, flags


def test_a_file_that_is_damaged_or_contradicts_itself_stops_the_run(refused, tmp_path):
    good, bad = toy_rows(4), f"{tmp_path / 'bad.jsonl'}:"
    refused(f"{tmp_path}/none.jsonl: no such file", "give a file", data__train=tmp_path / "none.jsonl")
    refused(bad + "2: broken JSON", "one complete JSON object a line", rows=[good[0], '{"id": "x", "prompt": '])
    refused("no usable question", "A row looks like this", rows=[])
    refused(bad + "1 and ", bad + "3", "id 'q0'", "its own 'id'", rows=[*good[:2], {**good[2], "id": "q0"}])
    twice = {**good[1], "rationales": [*good[1]["rationales"], good[1]["rationales"][0]]}
    refused(bad + "2, rationale 4", "teacher 'terse' a second time", "keep one", rows=[good[0], twice])
    refused("one question alone", "at least two", rows=good[:1])


@pytest.mark.parametrize("field", ["prompt", "answer", "rationales"])
@pytest.mark.parametrize("how", ["missing", "empty"])
def test_a_row_without_a_field_is_refused_by_file_line_and_field(refused, toy, tmp_path, capsys, field, how):
    rows = toy_rows(6)
    row = {**rows[3], field: [] if field == "rationales" else ""}
    if how == "missing":
        del row[field]
    refused("no usable question", f"{tmp_path / 'bad.jsonl'}:1: field '{field}' is missing", rows=[row])
    rows[3] = row
    train = write_rows(tmp_path / "bad.jsonl", rows)
    if (how, field) == ("missing", "answer"):  # the others train
        assert main(flags(toy, tmp_path / "rest", data__train=train, training__max_steps=1)) == 0
        assert f"{train}:4: field '{field}' is missing" in capsys.readouterr().out
        report = json.loads((tmp_path / "rest" / "report.json").read_text())
        assert report["questions"]["refused"] == 1 and report["questions"]["used"] == 4


def test_more_than_a_few_refusals_are_in_a_file_that_is_named(toy, tmp_path, capsys):
    rows = [{**row, "answer": row["answer"] if number < 4 else ""} for number, row in enumerate(toy_rows(12))]
    run, train = tmp_path / "run", write_rows(tmp_path / "few.jsonl", rows)
    assert main(flags(toy, run, data__train=train, training__max_steps=1)) == 0
    assert f"… and 3 more ({run / 'data_report.json'} has the first 100)" in capsys.readouterr().out
    assert len(json.loads((run / "data_report.json").read_text())["reasons"]) == 8


def test_questions_with_none_but_wrong_rationales_are_flagged_counted_and_used(toy, tmp_path, capsys):
    rows = [
        {
            **row,
            "rationales": [
                {"teacher": name, "completion": f"Hm. The answer is {n}."} for n, name in ((998, "a"), (999, "b"))
            ],
        }
        for row in toy_rows(6)
    ]
    train = write_rows(tmp_path / "wrong.jsonl", rows)
    assert main(flags(toy, tmp_path / "run", data__train=train, training__max_steps=1)) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["questions"]["all_wrong"] == report["questions"]["used"] == 5
    assert report["rationales"]["wrong"] == 10
    assert "every rationale wrong: 5 questions" in capsys.readouterr().out


def test_what_is_longer_than_the_context_is_said_before_training(refused, toy, tmp_path):
    refused("data.max_length: 300", "which is 256", "set data.max_length to 256 or less", data__max_length=300)
    suffix = "\nThe answer" + " is very long" * 60 + " {answer}."
    said = refused(
        "prompt and suffix alone are longer than data.max_length",
        "question 'q",
        "shorten data.suffix",
        "and 4 more",
        data__suffix=suffix,
    )
    assert "data_report.json" not in said and not (tmp_path / "run" / "data_report.json").exists()
    absolute = tmp_path / "gpt2"  # learned positions: there is nothing at all beyond the last
    from transformers import GPT2Config, GPT2LMHeadModel

    tokens = {"vocab_size": 384, "bos_token_id": 1, "eos_token_id": 2}
    GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, n_positions=64, **tokens)).save_pretrained(absolute)
    toy_tokenizer().save_pretrained(absolute)
    refused(f"more than {absolute} can read, which is 64", student__model=absolute)


def test_a_student_that_cannot_be_used_is_refused(refused, tmp_path):
    (tmp_path / "empty").mkdir()
    refused(
        f"student.model={tmp_path / 'empty'}", "not a causal LM", "Give a folder", student__model=tmp_path / "empty"
    )
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=384, **sizes)).save_pretrained(tmp_path / "bert")
    T5Model(T5Config(d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2, vocab_size=384)).save_pretrained(
        tmp_path / "t5"
    )
    for name, needle in (("bert", "which would be random"), ("t5", "not a causal LM")):
        toy_tokenizer().save_pretrained(tmp_path / name)
        refused(needle, student__model=tmp_path / name)
    refused("output head carries an adapter", "student.lora.targets", student__lora__targets="[lm_head]")


@pytest.mark.parametrize(
    "options, needles",
    [
        ({"adaptability__spam": "all"}, ["--adaptability.spam: unknown key", "did you mean adaptability.span?"]),
        ({"training__learning_rat": 1}, ["--training.learning_rat", "did you mean learning_rate?"]),
        ({"weights__temperature": 0}, ["--weights.temperature: 0 is out of range: above 0"]),
        ({"data__holdout": 1.5}, ["--data.holdout: 1.5 is out of range"]),
        ({"training__learning_rate": -1}, ["training.learning_rate: -1 is out of range: at least 0"]),
        ({"training__per_device_train_batch_size": 0}, ["training.per_device_train_batch_size: 0 is out of range"]),
        ({"training__num_train_epochs": 0}, ["training.num_train_epochs: 0 trains nothing", "max_steps"]),
        ({"training__logging_steps": 0}, ["training: ", "logging_steps"]),
        (
            {"training__load_best_model_at_end": True},
            ["training.load_best_model_at_end", "nothing is evaluated in between"],
        ),
        ({"strategy": "single", "weights__teacher": "word"}, ["weights.teacher", "'word'", "terse, wordy, wrong"]),
        ({"strategy": "single"}, ["weights.teacher: strategy single needs it"]),
        ({"evaluation__tasks__svamp": "/nowhere.jsonl"}, ["task svamp: there is no file /nowhere.jsonl"]),
        ({"consensus__affinity": "sentence"}, ["consensus.encoder: affinity sentence needs it"]),
    ],
)
def test_a_key_or_value_that_cannot_be_is_refused_by_name(refused, options, needles):
    refused(*needles, **options)


@pytest.mark.parametrize(
    ("held", "said"),
    [
        (None, "there is no file"),
        (b'{"text": "a"}\n{', "evaluation.held_text: {file}:2: broken JSON"),
        (b'{"text": "a"}\n["b"]', "evaluation.held_text: {file}:2: one JSON object"),
        ('{"text": "caf\u00e9"}'.encode("latin-1"), "evaluation.held_text: {file}:1: not UTF-8 text"),
    ],
)
def test_a_held_text_that_cannot_be_read_is_said_before_training(refused, tmp_path, held, said):
    if held is not None:
        (tmp_path / "held.jsonl").write_bytes(held)
    refused(said.replace("{file}", str(tmp_path / "held.jsonl")), evaluation__held_text=tmp_path / "held.jsonl")


def test_an_output_folder_that_is_not_this_run_is_left_alone(refused, finished, tmp_path):
    before = {name: (finished / name).stat().st_mtime_ns for name in files(finished)}
    refused(
        f"{finished} holds another run: seed is 0 there and 5 here",
        "--run",
        **{"run": finished, "seed": 5, "training__disable_tqdm": False, "trained": True},
    )
    assert {name: (finished / name).stat().st_mtime_ns for name in files(finished)} == before
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("x")
    refused("is not empty and holds no run", "--run", run=tmp_path / "thesis")
    assert files(tmp_path / "thesis") == {"chapter.tex"}
    refused("is a file, and a run needs a folder", run=tmp_path / "thesis" / "chapter.tex")


def test_a_file_may_be_named_in_another_way_when_a_run_goes_on(toy, finished, tmp_path, monkeypatch):
    shutil.copytree(finished, tmp_path / "run")
    recipe = plain(read_recipe(str(tmp_path / "run" / "recipe.yaml")))
    recipe["run"] = str(tmp_path / "run")
    monkeypatch.chdir(toy)
    assert Path(recipe["data"]["train"]).is_absolute()
    recipe["data"]["train"] = str(Path(recipe["data"]["train"]).relative_to(toy))
    claim(tmp_path / "run", from_dict(recipe))
    recipe["data"]["train"] = "./elsewhere.jsonl"
    with pytest.raises(UserError, match="data.train is .* there and './elsewhere.jsonl' here"):
        claim(tmp_path / "run", from_dict(recipe))


def test_a_key_that_an_older_version_did_not_write_is_at_its_default(refused, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "older")
    recipe = read_recipe(str(tmp_path / "older" / "recipe.yaml"))
    del recipe.value["head_dtype"], recipe.value["gradients"].value["every"]
    write_file(plain(recipe), tmp_path / "older" / "recipe.yaml")
    options = {"head_dtype": "float32", "training__disable_tqdm": False, "trained": True}
    refused("holds another run: head_dtype is 'auto' there and 'float32' here.", run=tmp_path / "older", **options)
    claim(tmp_path / "older", from_dict({**plain(recipe), "run": str(tmp_path / "older")}))


def test_a_command_that_failed_before_its_run_began_may_be_mended(refused, toy, tmp_path):
    refused("no such file", data__train=tmp_path / "none.jsonl")
    refused("there is no file", rows=toy_rows(9), evaluation__tasks__svamp="/nowhere.jsonl")  # after reading its data
    assert main(flags(toy, tmp_path / "run", training__max_steps=1)) == 0
