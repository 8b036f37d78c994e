"""Tasks, greedy answers, log-probabilities, comparisons, and the command that repeats them."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import BloomConfig, BloomForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from compact import evaluate as evaluation
from compact import generation
from compact.config import DataConfig, EvaluationConfig
from compact.data import load_questions
from compact.errors import UserError
from compact.evaluate import evaluate, evaluate_tasks, main, recipe_tasks
from compact.files import write_atomically
from compact.results import TaskResult, compare, load_results
from compact.statistics import mcnemar, wilson
from compact.student import prepare
from compact.tasks import INSTRUCTIONS, Task, TaskRow, load_task, task_from_questions
from compact.tokenization import prompt_ids
from tests.processes import two_ranks
from tests.toy import toy_tokenizer

GSM8K = {
    "id": "g1",
    "question": "Each of four children gets 9 of 36 eggs. How many eggs?",
    "solution": "There are 36 / 4 = <<36/4=9>>9 eggs per child.\n#### 9",
    "answer": "9",
}
STRATEGYQA = {"id": "s1", "question": "Do four children get eggs?", "explanation": "They do.", "answer": "yes"}
CSQA = {"id": "c1", "question": "Where are eggs?", "options": {"A": "in a nest", "B": "at sea"}, "answer": "A"}
DATA = DataConfig()


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def llama(**options) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=384, max_position_embeddings=256, **sizes, **options)
    return LlamaForCausalLM(config).eval()


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=384, n_embd=32, n_layer=2, n_head=4, n_positions=256)).eval()


def toy_task(n: int = 7, **fields) -> Task:
    rows = []
    for i in range(n):
        solution = "So 12 + 36 = 48." if i % 2 else None
        rows.append(TaskRow(f"q{i}", "Tom has 12 eggs" + " and 36 more" * i + ".", str(i), "number", solution))
    return Task("toy", tuple(replace(row, **fields) for row in rows), "id")


def run(model, task=None, **options) -> TaskResult:
    options = {"max_new_tokens": 8, "batch_size": 4, "progress": False} | options
    (result,) = evaluate(model, toy_tokenizer(), [task or toy_task()], **options).values()
    return result


# ------------------------------------------------------------------------------------------------------------- tasks


@pytest.mark.parametrize(
    ("row", "kind", "answer", "solution"),
    [
        (GSM8K, "number", "9", "There are 36 / 4 = 9 eggs per child."),
        (STRATEGYQA, "yesno", "yes", "They do."),
        (CSQA, "choice", "A", None),
        ({"question": "q?", "answer": "One fits. 4 is it.\n#### 1,234"}, "number", "1,234", "One fits. 4 is it."),
        ({"question": "q?", "answer": True}, "yesno", "yes", None),
        (
            {"question": "q?", "choices": {"label": ["A", "B"], "text": ["nest", "sea"]}, "answerKey": "B"},
            "choice",
            "B",
            None,
        ),
        ({"prompt": "q?", "answer": "blue"}, "text", "blue", None),
        ({"id": None, "prompt": "q?", "answer": 72.0, "options": None}, "number", "72", None),
        (
            {"question": "q?", "choices": {"label": ["1", "2"], "text": ["nest", "sea"]}, "answerKey": "2"},
            "choice",
            "B",
            None,
        ),
    ],
)
def test_files_load_as_they_are_and_their_kind_is_guessed(tmp_path, row, kind, answer, solution):
    task = load_task("t", write(tmp_path / "t.jsonl", row))
    assert (task.kind, task.rows[0].answer, task.rows[0].solution) == (kind, answer, solution)
    assert "guessed from the answers" in str(task)
    assert task.rows[0].prompt.endswith("\n" + INSTRUCTIONS[kind])


def test_options_are_lines_of_the_prompt(tmp_path):
    path = write(tmp_path / "t.jsonl", CSQA, {"question": "q?", "options": ["nest", "sea"], "answer": "B"})
    first, second = load_task("csqa", path, instruct=False).rows
    assert first.prompt == "Where are eggs?\nA) in a nest\nB) at sea" and first.options == 2
    assert second.prompt == "q?\nA) nest\nB) sea" and second.id == "csqa-2"


def test_a_row_s_own_kind_and_messages_are_kept(tmp_path):
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "What is 1/2?"}]
    asked = [{"role": "system", "content": [{"type": "text", "text": "s"}]}, messages[1]]
    path = write(tmp_path / "t.jsonl", {"prompt": asked, "answer": "1/2", "task": "math"})
    task = load_task("t", path)
    assert task.kind == "math" and task.kind_source == "told"
    assert task.rows[0].prompt == [messages[0], {"role": "user", "content": f"What is 1/2?\n{INSTRUCTIONS['math']}"}]


def test_a_limit_draws_the_same_questions_every_time(tmp_path):
    path = write(tmp_path / "t.jsonl", *({"id": i, "prompt": f"{i}?", "answer": i} for i in range(50)))
    drawn = [[row.id for row in load_task("t", path, limit=10, seed=seed).rows] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) == 10 and drawn[0] == sorted(drawn[0], key=int)


def test_held_out_questions_are_asked_as_in_training(tmp_path):
    row = {"id": "a", "prompt": "1 + 1?", "answer": "2"}
    row["rationales"] = [{"teacher": t, "completion": f"{t} says 2. #### 2"} for t in ("human", "machine")]
    chat = {**row, "id": "b", "prompt": [{"role": "user", "content": "2 + 0?"}]}
    questions, _ = load_questions(str(write(tmp_path / "t.jsonl", row, chat)), cache_dir=tmp_path / "cache")
    task = task_from_questions("held_out", questions, reference="machine")
    assert [row.prompt for row in task.rows] == ["1 + 1?", [{"role": "user", "content": "2 + 0?"}]]
    assert [row.solution for row in task.rows] == ["machine says 2."] * 2
    tasks = recipe_tasks(EvaluationConfig(forgetting={"eggs": str(write(tmp_path / "e.jsonl", GSM8K))}), questions, 0)
    assert [(task.name, task.split, len(task.rows)) for task in tasks] == [
        ("held_out", "id", 2),
        ("eggs", "forgetting", 1),
    ]


@pytest.mark.parametrize(
    ("rows", "options", "said"),
    [
        (None, {}, "there is no file"),
        ([], {}, "holds no questions"),
        (["{not json"], {}, "t.jsonl:1: broken JSON, column 2"),
        (["[1]"], {}, "t.jsonl:1: a list"),
        ([GSM8K, {"question": "q?"}], {}, "t.jsonl:2: field 'answer'"),
        ([GSM8K, {"question": "q?", "answer": float("nan")}], {}, "t.jsonl:2: field 'answer' is nan"),
        ([{"answer": "1"}], {}, "t.jsonl:1: field 'prompt'"),
        ([{"prompt": ["hello"], "answer": "1"}], {}, "messages are {role, content}"),
        ([GSM8K, GSM8K], {}, "t.jsonl:2: id 'g1' is also on line 1"),
        ([CSQA | {"answer": "E"}], {}, "none of the options A, B"),
        ([CSQA | {"options": "A or B"}], {}, "field 'options'"),
        ([CSQA | {"options": list("abcdefghijkl"), "answer": "L"}], {}, "12 options; at most 10"),
        ([GSM8K | {"task": "numbr"}], {}, "t.jsonl:1: field 'task' is 'numbr'"),
        ([GSM8K | {"answer": ["Paris", "paris"]}], {}, "t.jsonl:1: field 'answer' is a list; .*one gold answer"),
        ([GSM8K | {"answer": "it follows\n#### "}], {}, "t.jsonl:1: field 'answer' has nothing after ####"),
        ([GSM8K | {"answer": "hello", "task": "number"}], {}, "t.jsonl:1: the answer 'hello' is none of kind number"),
        ([CSQA, GSM8K], {}, "t.jsonl:2: the answer .* is none of kind choice"),
        ([GSM8K], {"split": "odd"}, "split 'odd' is none of id"),
    ],
)
def test_bad_files_are_refused_by_file_line_and_field(tmp_path, rows, options, said):
    path = tmp_path / "t.jsonl"
    if rows is not None:
        write(path, *rows)
    with pytest.raises(UserError, match=said):
        load_task("t", path, **options)


@pytest.mark.parametrize(
    "answers, kind", [(["7", "12", "1/2"], "number"), ([".5", "1e5"], "number"), (["7 up"], "text")]
)
def test_the_kind_is_guessed_from_all_answers(tmp_path, answers, kind):
    rows = [{"question": f"{i}?", "answer": answer, "task": None} for i, answer in enumerate(answers)]
    task = load_task("t", write(tmp_path / "t.jsonl", *rows))
    assert task.kind == kind and "guessed" in str(task)


def test_a_file_in_another_encoding_is_named_by_its_line_and_a_mark_of_order_is_skipped(tmp_path):
    text = json.dumps({**GSM8K, "question": "café?"}, ensure_ascii=False)
    (tmp_path / "latin.jsonl").write_bytes(f"\n{text}\n".encode("latin-1"))
    with pytest.raises(UserError, match="latin.jsonl:2: not UTF-8 text.*iconv -f LATIN1"):
        load_task("t", tmp_path / "latin.jsonl")
    (tmp_path / "marked.jsonl").write_text(text, encoding="utf-8-sig")
    assert len(load_task("t", tmp_path / "marked.jsonl").rows) == 1


def test_two_tasks_of_one_name_are_refused(tmp_path):
    path = str(write(tmp_path / "t.jsonl", GSM8K))
    with pytest.raises(UserError, match="two tasks are called 'eggs'"):
        recipe_tasks(EvaluationConfig(tasks={"eggs": path}, forgetting={"eggs": path}), None, 0)


# ------------------------------------------------------------------------------------------------------------ answers


@pytest.mark.parametrize("build", [llama, gpt2])
def test_a_batch_answers_as_each_question_alone_and_greedily(build):
    model, tokenizer, task = build(), toy_tokenizer(), toy_task()
    batched = run(model, task, batch_size=4)
    for row, got in zip(task.rows, batched.predictions):
        ids = prompt_ids(tokenizer, row.prompt, DATA.prompt_template)
        start = len(ids)
        for _ in range(8):
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
            if ids[-1] == tokenizer.eos_token_id:
                break
        assert got["id"] == row.id
        assert got["text"] == tokenizer.decode(ids[start:], skip_special_tokens=True)


@pytest.mark.parametrize("build", [llama, gpt2])
def test_log_probabilities_are_those_of_the_whole_logits(build, monkeypatch):
    monkeypatch.setattr(generation, "LOGIT_CHUNK", 384 * 3)  # three rows at a time
    model, tokenizer, task = build(), toy_tokenizer(), toy_task()
    for row, got in zip(task.rows, run(model, task).predictions):
        prompt = prompt_ids(tokenizer, row.prompt, DATA.prompt_template)
        suffix = [*tokenizer(f"\nThe answer is {row.answer}.")["input_ids"], tokenizer.eos_token_id]
        values = _logprobs(model, prompt, suffix)
        [digit] = [i for i, token in enumerate(suffix) if row.answer in tokenizer.decode(token)]
        assert got["suffix_logprob"] == pytest.approx(values.mean().item(), abs=1e-5)
        assert got["answer_logprob"] == pytest.approx(values[digit].item(), abs=1e-5)
        if row.solution is None:
            assert got["solution_logprob"] is None
        else:
            values = _logprobs(model, prompt, tokenizer(" " + row.solution)["input_ids"])
            assert got["solution_logprob"] == pytest.approx(values.mean().item(), abs=1e-5)


def _logprobs(model, prompt: list[int], target: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits = model(torch.tensor([prompt + target])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1)[range(len(target)), target]


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")  # its name in transformers 5.17
def test_the_model_comes_back_as_it_was_given():
    model = llama()
    model.train()
    model.model.layers[0].eval()
    model.gradient_checkpointing_enable()
    model.config.use_cache = False
    model.generation_config.repetition_penalty = 3.0
    modes = [module.training for module in model.modules()]
    own, penalised = model.generation_config, run(model)
    assert [module.training for module in model.modules()] == modes
    assert model.generation_config is own and own.repetition_penalty == 3.0
    assert model.config.use_cache is False and model.is_gradient_checkpointing
    assert [row["text"] for row in penalised.predictions] == [row["text"] for row in run(llama()).predictions]


def test_a_wrapped_student_answers_with_its_adapter():
    torch.manual_seed(1)
    adapted = get_peft_model(
        prepare(llama()), LoraConfig(r=4, target_modules=["q_proj", "down_proj"], lora_dropout=0.5)
    )
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    wrapped, plain = run(torch.nn.ModuleDict({"module": adapted})), run(llama())
    merged = run(adapted.merge_and_unload())
    assert [row["text"] for row in wrapped.predictions] == [row["text"] for row in merged.predictions]
    assert [row["text"] for row in wrapped.predictions] != [row["text"] for row in plain.predictions]
    for ours, theirs in zip(wrapped.predictions, merged.predictions):
        assert ours["answer_logprob"] == pytest.approx(theirs["answer_logprob"], abs=1e-4)


def test_an_answer_ends_at_any_of_the_end_tokens():
    model, task = llama(), toy_task(1)
    first = run(model, task).predictions[0]
    prompt = torch.tensor([prompt_ids(toy_tokenizer(), task.rows[0].prompt, DATA.prompt_template)])
    answer = model.generate(prompt, max_new_tokens=8, do_sample=False, pad_token_id=0)[0, prompt.shape[1] :].tolist()
    model.generation_config.eos_token_id = [2, answer[3]]
    stopped = run(model, task).predictions[0]
    assert not first["finished"] and first["tokens"] == 8
    assert stopped["finished"] and stopped["tokens"] == answer.index(answer[3])
    assert first["text"].startswith(stopped["text"])


def test_the_next_question_that_a_base_model_asks_itself_is_not_its_answer(monkeypatch):
    model, tokenizer = llama(), toy_tokenizer()
    said = "It is 5. The answer is 5.\n\nQuestion: Tom has 72 eggs?"
    ids = torch.tensor([tokenizer(said)["input_ids"]])
    monkeypatch.setattr(model, "generate", lambda input_ids, **_: torch.cat([input_ids, ids], dim=1))
    row = run(model, toy_task(1, answer="5")).predictions[0]
    assert row["text"] == "It is 5. The answer is 5.\n" and row["correct"] and row["finished"]


def test_prompts_too_long_for_the_context_are_named():
    rows = toy_task().rows
    long = replace(rows[6], prompt="Tom has eggs " * 100)
    with pytest.raises(UserError, match="question q6: its prompt has .* leaves no room"):
        run(llama(), Task("t", (*rows[:6], long)))
    with pytest.raises(UserError, match="no questions"):
        run(llama(), Task("t", ()))
    tight = replace(rows[6], prompt="x " * 120)  # room for a token, not for the suffix
    with pytest.raises(UserError, match="question q6: its prompt and the suffix with its answer have .* the model's"):
        run(gpt2(), Task("t", (*rows[:6], tight)))


def test_a_model_whose_positions_have_no_end_answers():
    torch.manual_seed(0)
    model = BloomForCausalLM(BloomConfig(vocab_size=384, hidden_size=32, n_layer=2, n_head=4)).eval()
    assert not hasattr(model.config, "max_position_embeddings")
    assert [row["tokens"] for row in run(model).predictions] == [8] * 7


def test_a_long_prompt_takes_no_room_from_the_others_of_its_batch():
    rows = toy_task().rows
    long = replace(rows[6], prompt="x " * 110)
    alone = run(llama(), Task("t", rows[:3]), max_new_tokens=64)
    beside = run(llama(), Task("t", (*rows[:3], long)), max_new_tokens=64)
    assert [row["text"] for row in beside.predictions[:3]] == [row["text"] for row in alone.predictions]
    assert beside.predictions[3]["tokens"] < 64


# ------------------------------------------------------------------------------------------------------------ results


TEXTS = ["The answer is 0.", "It is 1", "The answer is 9.", "nothing"]


def test_strict_and_flexible_accuracy_and_their_errors(monkeypatch):
    monkeypatch.setattr(
        evaluation, "generate_answers", lambda c, t, rows, *_: [(TEXTS[int(r.id[1])], 3, True) for r in rows]
    )
    result = run(llama(), toy_task(4))
    summary = result.summary()
    assert [row["correct"] for row in result.predictions] == [True, True, False, False]
    assert [row["strict"] for row in result.predictions] == ["0", None, "9", None]
    assert summary["accuracy"] == result.accuracy == 0.5 and summary["strict"]["accuracy"] == 0.25
    assert summary["standard_error"] == pytest.approx(math.sqrt(0.5 * 0.5 / 4))
    assert summary["strict"]["standard_error"] == pytest.approx(math.sqrt(0.25 * 0.75 / 4))
    assert summary["answer_logprob"]["n"] == 4 and summary["solution_logprob"]["n"] == 2


def test_an_interval_has_a_width_where_the_standard_error_has_none():
    low, high = wilson(0, 200)
    assert low == 0 and high == pytest.approx(1.96**2 / (200 + 1.96**2))
    assert wilson(100, 200)[0] == pytest.approx(0.4314, abs=1e-4)


def _result(flags: str, options: int = 0) -> TaskResult:
    rows = [{"id": str(i), "correct": flag == "1", "options": options} for i, flag in enumerate(flags)]
    return TaskResult("t", "forgetting", "choice", rows)


def test_what_was_forgotten_and_gained_is_counted_item_by_item():
    changes = compare(_result("1111000000"), _result("1000111000"))
    assert (changes["forgotten"], changes["gained"], changes["kept"], changes["n"]) == (3, 3, 1, 10)
    assert changes["forgotten_ids"] == ["1", "2", "3"] and changes["gained_ids"] == ["4", "5", "6"]
    assert changes["change"] == 0 and changes["p_value"] == 1
    assert changes["standard_error"] == pytest.approx(math.sqrt(6) / 10)
    assert "forgotten_by_luck" not in changes


def test_luck_alone_flips_as_many_as_guessers_would():
    # 30 wrong of 5 options: 30/4 = 7.5 lucky hits are behind them, of which 4/5 miss the next time.
    changes = compare(_result("1" * 10 + "0" * 30, options=5), _result("1" * 20 + "0" * 20, options=5))
    assert changes["forgotten_by_luck"] == pytest.approx(7.5 * 4 / 5)
    assert changes["gained_by_luck"] == pytest.approx(5 * 4 / 5)


def test_the_exact_test_of_changes():
    assert mcnemar(0, 5) == pytest.approx(2 / 32)
    assert mcnemar(1, 3) == pytest.approx(2 * 5 / 16)
    assert mcnemar(0, 0) == mcnemar(4, 4) == 1


def test_results_about_different_questions_are_not_compared():
    with pytest.raises(ValueError, match="in one result only, such as '2'"):
        compare(_result("11"), _result("110"))


def test_stored_results_come_back(tmp_path):
    stored = evaluate_tasks(
        *(llama(), toy_tokenizer(), [toy_task(prompt="1 + 1?\u2028Say.\x85")], tmp_path, "before"),
        max_new_tokens=4,
        progress=False,
    )
    loaded, settings = load_results(tmp_path, "before")
    assert loaded["toy"].predictions == stored["toy"].predictions
    assert loaded["toy"].summary() == stored["toy"].summary() | {"seconds": loaded["toy"].summary()["seconds"]}
    assert settings["max_new_tokens"] == 4 and settings["suffix"] == DATA.suffix
    assert load_results(tmp_path, "after") == ({}, {})
    stored = tmp_path / "evaluation" / "before"
    for name in ("toy.jsonl", "summary.json"):
        whole = (stored / name).read_text()
        for damaged in ("", whole[: len(whole) // 2]):
            (stored / name).write_text(damaged)
            with pytest.raises(UserError, match=f"{stored / name} is damaged"):
                load_results(tmp_path, "before")
        (stored / name).write_text(whole)
    (stored / "toy.jsonl").unlink()
    with pytest.raises(UserError, match="toy.jsonl is damaged"):
        load_results(tmp_path, "before")


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "a" / "b.json"
    write_atomically(path, "old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="cannot write .*b.json: No space left on device"):
        write_atomically(path, "new")
    assert path.read_text() == "old" and [p.name for p in path.parent.iterdir()] == ["b.json"]


# ------------------------------------------------------------------------------------------------------------ command


@pytest.fixture
def finished(tmp_path) -> Path:
    model, tokenizer = llama(), toy_tokenizer()
    (tmp_path / "recipe.yaml").write_text("seed: 0\n")
    model.save_pretrained(tmp_path / "student")
    tokenizer.save_pretrained(tmp_path / "student")
    tasks = [toy_task(), replace(toy_task(3), name="eggs", split="forgetting")]
    evaluate_tasks(model, tokenizer, tasks, tmp_path, "after", batch_size=2, max_new_tokens=4, progress=False)
    return tmp_path


def test_the_command_repeats_an_evaluation_and_says_whether_it_agrees(finished, capsys):
    assert main([str(finished), "--split", "id"]) == 0
    said = capsys.readouterr().out
    assert "toy (id, n = 7)" in said and "all 7 answers are the same" in said and "eggs" not in said
    path = finished / "evaluation" / "after" / "eggs.jsonl"
    rows = [json.loads(line) for line in path.open()]
    write(path, *({**row, "text": "another", "correct": not row["correct"]} for row in rows))
    assert main([str(finished), "--split", "forgetting"]) == 0
    assert "differs from the stored result" in capsys.readouterr().out
    assert [json.loads(line)["text"] for line in path.open()] == ["another"] * 3  # the stored result stays


def test_a_part_of_a_first_evaluation_is_no_run_s_result(finished, capsys):
    evaluation = finished / "evaluation"
    (evaluation / "after").rename(evaluation / "before")
    for part in (["--split", "id"], ["--max_new_tokens", "3"]):
        assert main([str(finished), *part]) == 0
        assert "stored in evaluation/repeated" in capsys.readouterr().out and not (evaluation / "after").exists()
    assert main([str(finished)]) == 0
    assert load_results(finished, "after")[0].keys() == {"toy", "eggs"}


def test_a_student_that_cannot_be_loaded_is_named(finished, capsys):
    config = json.loads((finished / "student" / "config.json").read_text())
    own = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.OwnModel"}
    (finished / "student" / "config.json").write_text(json.dumps({**config, "model_type": "own", "auto_map": own}))
    assert main([str(finished)]) == 2
    assert "student cannot be loaded" in capsys.readouterr().err


def test_two_processes_give_the_result_of_one(finished):
    done = two_ranks("compact.evaluate", str(finished))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("all 7 answers are the same") == 1
    alone, together = (load_results(finished, when)[0] for when in ("after", "repeated"))
    for name in ("toy", "eggs"):
        assert alone[name].predictions == together[name].predictions


def test_the_command_refuses_what_is_no_finished_run(tmp_path, capsys):
    def said() -> str:
        assert main([str(tmp_path / "run")]) == 2
        return capsys.readouterr().err

    assert "is not a folder" in said()
    (tmp_path / "run" / "checkpoints" / "checkpoint-5").mkdir(parents=True)
    assert "holds no recipe.yaml" in said()
    (tmp_path / "run" / "recipe.yaml").write_text("seed: 0\n")
    assert "training has not finished" in said()
    llama().save_pretrained(tmp_path / "run" / "student")
    toy_tokenizer().save_pretrained(tmp_path / "run" / "student")
    assert "holds no results to repeat" in said()
