import json

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest

from compact.data import load_questions, prompt_of, prompt_text, question_text, split
from compact.data_report import DataReport
from compact.errors import UserError
from compact.sources import JsonLines


def question(name="1", prompt="How many eggs?", answer="72", **changes):
    rationales = [
        {"teacher": "a", "completion": "Count them.\n#### 72"},
        {"teacher": "b", "completion": "Add 36 to 36. So the answer is 72."},
    ]
    return {"id": name, "prompt": prompt, "answer": answer, "rationales": rationales, **changes}


def long(teacher, completion="So 72.\n#### 72", **changes):
    return {"id": "1", "prompt": "How many?", "answer": "72", "teacher": teacher, "completion": completion, **changes}


@pytest.fixture
def load(tmp_path):
    """Writes rows as JSON Lines and loads them."""

    def load(rows, name="questions.jsonl", **options):
        path = tmp_path / name
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return load_questions(path, cache_dir=tmp_path / "cache", **options)

    return load


def balanced(report: DataReport) -> bool:
    return all(c["read"] == c["used"] + c["refused"] for c in (report.questions, report.rationales))


def test_one_row_a_question(load):
    dataset, report = load([question(), question("2", "And now?")])
    assert dataset[0] == {
        "id": "1",
        "prompt": "How many eggs?",
        "is_messages": False,
        "answer": "72",
        "kind": "number",
        "rationales": [
            {"teacher": "a", "body": "Count them.", "answer": "72", "wrong": False, "recognised": True},
            {"teacher": "b", "body": "Add 36 to 36.", "answer": "72", "wrong": False, "recognised": True},
        ],
    }
    assert report.teachers == ["a", "b"]
    assert report.questions == {"read": 2, "used": 2, "refused": 0, "all_wrong": 0}
    assert report.rationales["used"] == 4 and balanced(report)


def test_long_form_is_grouped_by_id_wherever_its_rows_stand(load):
    rows = [
        long("a"),
        long("a", id="2", prompt="Else?"),
        long("b"),
        long("c", prompt=None),
        long("b", id="2", prompt="Else?"),
    ]
    dataset, report = load(rows)
    assert [(row["id"], [r["teacher"] for r in row["rationales"]]) for row in dataset] == [
        ("1", ["a", "b", "c"]),
        ("2", ["a", "b"]),
    ]
    assert report.questions["read"] == 2 and report.rationales["read"] == 5 and balanced(report)


def test_long_form_without_ids_is_grouped_by_prompt(load):
    rows = [long("a", id=None), long("a", id=None, prompt="Else?"), long("b", id=None)]
    dataset, _ = load(rows)
    assert [len(row["rationales"]) for row in dataset] == [2, 1]
    assert len(set(dataset["id"])) == 2 and all(dataset["id"])


@pytest.mark.parametrize("form", ["parquet", "folder", "dataset"])
@pytest.mark.parametrize("shape", ["nested", "long"])
def test_every_format_gives_the_same_questions(load, tmp_path, form, shape):
    rows = [question(), question("2", "And now?")] if shape == "nested" else [long("a"), long("b"), long("a", id="2")]
    expected, expected_report = load(rows)
    if form == "parquet":
        source = tmp_path / "q.parquet"
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), source)
    else:
        source = datasets.Dataset.from_list(rows)
        if form == "folder":
            source.save_to_disk(tmp_path / "saved")
            source = str(tmp_path / "saved")
    dataset, report = load_questions(source, cache_dir=tmp_path / "cache")
    assert dataset.to_list() == expected.to_list()
    assert report.to_dict() == expected_report.to_dict()


def test_dataset_dict_folder_gives_its_train_split(tmp_path):
    datasets.DatasetDict(
        train=datasets.Dataset.from_list([question()]), test=datasets.Dataset.from_list([question("9")])
    ).save_to_disk(tmp_path / "saved")
    assert load_questions(tmp_path / "saved")[0]["id"] == ["1"]


def test_prompts_may_be_messages(load):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How  Many?"}]
    dataset, _ = load([question(prompt=messages)])
    assert prompt_of(dataset[0]) == messages
    assert question_text(dataset[0]) == "how many?"  # what is said to all questions makes none


def test_a_message_may_be_of_parts_of_text(load):
    parts = [{"type": "text", "text": "How many eggs?"}, {"type": "text", "text": "Count."}]
    dataset, _ = load([question(prompt=[{"role": "user", "content": parts}])])
    assert prompt_of(dataset[0]) == [{"role": "user", "content": "How many eggs?\nCount."}]


def test_a_solution_before_the_answer_is_no_part_of_it(load):
    """GSM8K's own form."""
    dataset, _ = load([question(answer="She sells 9*2 = <<9*2=18>>18 eggs.\n#### 18")])
    assert dataset[0]["answer"] == "18"


def test_answers_may_be_numbers_and_truth_values(load):
    rows = [question(answer=72), question("2", "b", 72.0), question("3", "c", True, task="yesno")]
    rows.append(question("4", "d", 0.00005))
    assert load(rows)[0]["answer"] == ["72", "72", "yes", "0.00005"]


def test_half_a_character_of_a_text_that_was_cut_off_is_read_as_a_question_mark(load):
    cut = [{"teacher": "a", "completion": "Sum \ud83d\n#### 72"}]
    dataset, _ = load([question(rationales=cut), question("2", "whole \U0001f600")])
    assert dataset["prompt"][1] == "whole \U0001f600" and dataset[0]["rationales"][0]["body"] == "Sum ?"


def test_wrong_answers_are_flagged_and_unknown_ones_are_not_wrong(load):
    rationales = [
        {"teacher": "right", "completion": "Sum.\n#### 72.0"},
        {"teacher": "wrong", "completion": "Sum.\n#### 73"},
        {"teacher": "field", "completion": "Sum. So the answer is 72.", "answer": "70"},  # the field knows better
        {"teacher": "unknown", "completion": "Sum it up somehow."},
    ]
    dataset, report = load([question(rationales=rationales)])
    assert [(r["answer"], r["wrong"], r["recognised"]) for r in dataset[0]["rationales"]] == [
        ("72.0", False, True),
        ("73", True, True),
        ("70", True, True),
        (None, False, False),
    ]
    assert report.rationales["wrong"] == 2 and report.rationales["unrecognised_closings"] == 1


def test_a_choice_stated_in_words_is_unknown_and_not_wrong(load):
    said = [{"teacher": "a", "completion": "I see. The answer is a bank."}, {"teacher": "b", "completion": "#### (A)"}]
    asked = question(prompt="A) a dog B) a cat C) a bank", answer="C", rationales=said, task="choice")
    dataset, report = load([asked])
    assert [(r["answer"], r["wrong"]) for r in dataset[0]["rationales"]] == [(None, False), ("A", True)]
    assert report.reason_counts == {"a stated answer without a letter, which counts as unknown:": 1}


def test_question_with_only_wrong_rationales_stays_and_is_counted(load):
    dataset, report = load([question(answer="5")])
    assert len(dataset) == 1 and report.questions["all_wrong"] == 1 and report.rationales["wrong"] == 2


def test_bare_answer_is_a_rationale_with_an_empty_body(load):
    dataset, _ = load([question(rationales=[{"teacher": "a", "completion": "#### 72"}])])
    assert dataset[0]["rationales"][0]["body"] == ""


REFUSED = [
    (question("x", prompt=""), "'prompt' is missing"),
    (question("x", prompt=None), "'prompt' is missing"),
    (question("x", prompt=[{"role": "user"}]), "'content'"),
    (question("x", prompt=[{"role": "assistant", "content": "Hi"}]), "assistant"),
    (question("x", prompt=[{"from": "human", "value": "Hi"}]), "rename 'from' to 'role' (human to user"),
    (question("x", prompt=[{"role": "user", "content": [{"type": "image_url"}]}]), "'image_url' (message 1)"),
    (question("x", prompt=[{"role": "user", "content": []}]), "without 'content' (message 1)"),
    (question("x", answer=" "), "'answer' is missing"),
    (question("x", answer=float("nan")), "'answer' is missing"),
    (question("x", answer="C"), "'C' is no number"),
    (
        question("x", answer="1.5 million"),
        "'1.5 million' is no number (data.answer_kind, or 'task'), which is one number",
    ),
    (question("x", task="numbr"), "did you mean 'number'"),
    (question("x", rationales=[]), "'rationales' is missing"),
    (question("x", rationales=None), "'rationales' is missing"),
    (question("x", rationales=[{"teacher": "a", "completion": ""}]), "'rationales' is missing or empty, or none"),
    ([1, 2], "not a JSON object"),
]


@pytest.mark.parametrize("row, reason", REFUSED)
def test_unusable_row_is_refused_with_its_place(load, row, reason):
    dataset, report = load([question(), row])
    assert dataset["id"] == ["1"]
    assert report.questions["refused"] == 1 and balanced(report)
    assert any("questions.jsonl:2: " in line and reason in line for line in report.reasons), report.reasons
    assert sum(report.reason_counts.values()) >= 1


@pytest.mark.parametrize(
    "rationale, reason",
    [
        ({"teacher": "c", "completion": "  "}, "'completion' is missing"),
        ({"teacher": "c"}, "'completion' is missing"),
        ({"completion": "Sum.\n#### 72"}, "'teacher' is missing"),
        ({"teacher": 3, "completion": "Sum.\n#### 72"}, "'teacher' is missing"),
        ("text", "not a JSON object"),
    ],
)
def test_unusable_rationale_is_refused_and_the_others_stay(load, rationale, reason):
    row = question()
    row["rationales"].append(rationale)
    dataset, report = load([row])
    assert len(dataset[0]["rationales"]) == 2
    assert report.rationales["refused"] == 1 and report.rationales["read"] == 3 and balanced(report)
    assert "questions.jsonl:1, rationale 3: " in report.reasons[0] and reason in report.reasons[0]


@pytest.mark.parametrize(
    "options", [{"A": "a lake", "B": "a hat"}, ["a lake", "a hat"], {"label": ["A", "B"], "text": ["a lake", "a hat"]}]
)
def test_choices_that_the_prompt_does_not_show_are_told_of(load, options):
    row = {"answer": "B", "task": "choice", "rationales": [{"teacher": "t", "completion": "The answer is B."}]}
    told = "field 'options' is not read in training: write the choices into 'prompt'"
    _, report = load([{**row, "prompt": "What is worn?", "options": options}])
    assert report.reason_counts == {told: 1} and report.questions["used"] == 1 and "(a lake)" in report.reasons[0]
    _, report = load([{**row, "prompt": "What is worn? A) a lake B) a hat", "options": options}])
    assert report.reason_counts == {}
    _, report = load([row | {"question": "What is worn?"}, {**row, "prompt": "x"}])
    assert "field 'prompt' is missing, empty or no text; rename field 'question'" in report.reason_counts


def test_copies_of_a_row_are_refused(load):
    dataset, report = load([question(), long("a", id="2"), question(), long("b", id="2"), long("a", id="2")])
    assert [len(row["rationales"]) for row in dataset] == [2, 2]
    assert report.reason_counts == {"copy of another row": 2} and balanced(report)


STOPS = [
    ([question(), '{"id": "2", "prompt'], ("questions.jsonl:2", "broken JSON, column", "one complete JSON object")),
    (['[{"id": 1},', "{}]"], ("questions.jsonl:1", "one JSON array", "jq -c")),
    ([question(), question(prompt="Else?")], ("questions.jsonl:1", "questions.jsonl:2", "id '1'", "own 'id'")),
    ([long("a"), long("b", prompt="Else?")], ("id '1' with two prompts", "own 'id'")),
    ([long("a"), long("b", answer="73")], ("id '1' with two answers", "'72'", "'73'")),
    ([long("a"), long("a", "Other.\n#### 72")], ("teacher 'a' a second time", "questions.jsonl:2", "'a-1'")),
    ([question(rationales=question()["rationales"][:1] * 2)], ("teacher 'a' a second time", "rationale 2")),
    ([question(prompt="")], ("no usable question", "'prompt' is missing", "A row looks like this")),
    ([], ("no usable question", "no rows")),
]


@pytest.mark.parametrize("rows, parts", STOPS)
def test_damaged_or_contradictory_file_stops_with_place_and_way_out(load, rows, parts):
    with pytest.raises(UserError) as error:
        load(rows)
    for part in parts:
        assert part in str(error.value)


def test_stop_leaves_nothing_in_the_cache(load, tmp_path):
    with pytest.raises(UserError):
        load([question(), "{"])
    assert list((tmp_path / "cache").iterdir()) == []


def test_missing_files_and_unknown_formats_are_named(tmp_path):
    with pytest.raises(UserError, match="nowhere.jsonl: no such file"):
        load_questions(tmp_path / "nowhere.jsonl")
    with pytest.raises(UserError, match="cannot be had as a dataset of the hub"):
        load_questions("nobody/nothing-of-this-name", cache_dir=tmp_path)
    (tmp_path / "q.csv").write_text("id,prompt\n")
    with pytest.raises(UserError, match="q.csv: a file of questions ends in .jsonl"):
        load_questions(tmp_path / "q.csv")
    (tmp_path / "q.parquet").write_text("no parquet")
    with pytest.raises(UserError, match="q.parquet: cannot be read as Parquet"):
        load_questions(tmp_path / "q.parquet")
    (tmp_path / "q.jsonl").write_bytes(b'{"id": "\xff"}\n')
    with pytest.raises(UserError, match="q.jsonl:1: not UTF-8"):
        load_questions(tmp_path / "q.jsonl")
    with pytest.raises(UserError, match="not one written by datasets.save_to_disk"):
        load_questions(tmp_path)
    with pytest.raises(UserError, match="did you mean 'choice'"):
        load_questions(tmp_path / "q.jsonl", answer_kind="choise")


def test_changed_file_is_read_anew_and_an_unchanged_one_is_not(load, tmp_path):
    load([question()])
    cached = sorted(tmp_path.glob("cache/questions-*"))
    stamps = [path.stat().st_mtime_ns for path in cached]
    load([question()])
    assert sorted(tmp_path.glob("cache/questions-*")) == cached
    assert [path.stat().st_mtime_ns for path in cached] == stamps
    assert load([question(answer="73")])[0]["answer"] == ["73"]  # same name, same length
    assert load([question(answer="73")], answer_kind="text")[0]["kind"] == ["text"]


def test_blank_lines_and_byte_order_mark_do_not_matter(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text("\ufeff" + json.dumps(question()) + "\n\n  \n" + json.dumps(question("2", "b", " ")) + "\n")
    dataset, report = load_questions(path)
    assert len(dataset) == 1 and f"{path}:4: " in report.reasons[0]


def test_one_question_in_two_forms_is_on_one_side(load):
    texts = [f"What is {n}{square}?" for n in range(40) for square in ("x^2", "x²")]
    dataset, _ = load([question(str(index), text) for index, text in enumerate(texts)])
    train, held_out = split(dataset, 0.2, seed=0)
    assert not {question_text(row) for row in train} & {question_text(row) for row in held_out}
    assert len(held_out) == 16


def test_one_question_with_and_without_a_system_s_message_is_on_one_side(load):
    rows = []
    for number in range(10):
        asked = {"role": "user", "content": f"What is {number}?"}
        rows.append(question(f"plain-{number}", asked["content"]))
        rows.append(question(f"told-{number}", [{"role": "system", "content": "Be brief."}, asked]))
    train, held_out = split(load(rows)[0], 0.2, seed=0)
    assert not {question_text(row) for row in train} & {question_text(row) for row in held_out}
    assert len(held_out) == 4


def test_what_is_no_choice_and_no_answer_of_its_own_is_no_crash(load):
    odd = [4, True, 5.0, {"text": 5}, {"label": ["A"], "text": None}]
    for number, choices in enumerate(odd):
        dataset, _ = load([question("1", "How many?", choices=choices)], name=f"{number}.jsonl")
        assert len(dataset) == 1
    said = [{"teacher": "a", "completion": "It is so.", "answer": "."}]
    dataset, _ = load([question("1", "How many?", rationales=said)], name="own.jsonl")
    assert dataset[0]["rationales"][0]["answer"] is None and not dataset[0]["rationales"][0]["wrong"]


def test_split_is_by_question_text(load):
    rows = [question(str(i), f"Question {i // 2}?" if i % 2 else f" question  {i // 2}? ") for i in range(40)]
    dataset, _ = load(rows)
    train, held_out = split(dataset, 0.25, seed=1)
    assert len(train) == 30 and len(held_out) == 10
    assert not {question_text(row) for row in train} & {question_text(row) for row in held_out}
    backwards, _ = load(rows[::-1])
    assert sorted(split(backwards, 0.25, seed=1)[1]["id"]) == sorted(held_out["id"])
    assert sorted(split(dataset, 0.25, seed=2)[1]["id"]) != sorted(held_out["id"])
    assert len(split(dataset, 0.0, seed=1)[1]) == 0
    assert len(split(dataset, 0.001, seed=1)[1]) == 2
    assert len(split(dataset, 0.999, seed=1)[0]) == 2
    with pytest.raises(UserError, match="data.holdout"):
        split(dataset, 1.0, seed=1)


def test_stages_and_parts_of_a_report_add_up():
    first, later = DataReport(teachers=["a", "b"]), DataReport(teachers=["b"])
    first.questions.update(read=10, used=8, refused=2)
    later.questions.update(read=5, used=4, refused=1)
    later.because("q", "too long")
    chained = first.then(later)
    assert (chained.questions["read"], chained.questions["used"], chained.questions["refused"]) == (10, 4, 3)
    assert chained.teachers == ["b", "a"]  # the indices of the later stage's items hold
    assert "4 of 10 questions used" in chained.summary() and "1 × too long" in chained.summary()


def test_reading_holds_no_rows_in_memory(tmp_path, monkeypatch):
    """Only as many parsed rows are alive as one batch of the Arrow file takes."""
    alive = peak = 0

    class Row(dict):
        def __init__(self, *args):
            nonlocal alive, peak
            super().__init__(*args)
            alive += 1
            peak = max(peak, alive)

        def __del__(self):
            nonlocal alive
            alive -= 1

    parse = JsonLines._parse
    monkeypatch.setattr(JsonLines, "_parse", lambda self, line, number: Row(parse(self, line, number)))
    path = tmp_path / "q.jsonl"
    path.write_text("".join(json.dumps(long("a", id=str(i % 1000))) + "\n" for i in range(1000)))
    dataset, _ = load_questions(path, cache_dir=tmp_path / "cache")
    assert len(dataset) == 1000 and peak < 10
    assert dataset.cache_files  # memory-mapped


def test_questions_are_told_apart_by_their_text_and_by_exponents_but_not_by_its_form():
    texts = ["What is 3² + 1?", "what  is 3^2 + 1?", "What is 32 + 1?", "What is ３2 + 1?"]
    squared, spelled, plain, wide = map(prompt_text, texts)
    assert squared == spelled != plain == wide
    assert prompt_text([{"role": "user", "content": texts[0]}]) == squared
    assert prompt_text("10⁻³ of 2¹⁰") == "10^-3 of 2^10"
