import builtins
import threading

import pytest

from compact.answers import canonical, extract, is_answer, same_answer, strip_closing
from compact.errors import UserError

CLOSINGS = [
    ("It is 3+4=7.\n#### 72", "It is 3+4=7.", "72"),
    ("He has 72. So the answer is 72.", "He has 72.", "72"),
    ("The bank.\nThe answer is (C)", "The bank.", "(C)"),
    ("Add.\nTherefore, the final answer is: 72", "Add.", "72"),
    (r"Add. \boxed{72}", "Add.", "72"),
    (r"Add. Therefore \boxed{72}.", "Add.", "72"),
    ("Add.\n\\[\n\\boxed{72}\n\\]", "Add.", "72"),
    (r"Add. The final answer is $\boxed{\frac{1}{2}}$.", "Add.", r"\frac{1}{2}"),
    ("It can.\nAnswer: yes", "It can.", "yes"),
    ("Add.\n**Answer: 72**", "Add.", "72"),
    ("Add.\n\n## Final Answer\n\n72", "Add.", "72"),
    ("Since 3+4=7, the answer is $1,234.50.", "Since 3+4=7", "$1,234.50"),
    ("Add. Thus 72 is the answer.", "Add.", "72"),
    ("Add. Hence, the correct option is (B) bank.", "Add.", "(B) bank"),
    ("Add.\nSo the answer is 72.\n#### 72", "Add.", "72"),
    ("#### 72", "", "72"),
    ("Add. The answer is 5. I hope this helps! 😊", "Add.", "5"),
    ("Add. The answer is 5. Let me know if you have questions ✌🏽 :)", "Add.", "5"),
]


@pytest.mark.parametrize("completion, body, stated", CLOSINGS)
def test_closing_statement_comes_off(completion, body, stated):
    assert strip_closing(completion) == (body, stated, True)
    assert strip_closing(completion + " \n") == (body, stated, True)


@pytest.mark.parametrize(
    "text",
    [
        "The answer is 72. But then we check it again and stop.",
        "#### 72\nThat was all of it.",
        "He has 72 eggs.",
        "The answer is not clear.",
        "the answer isn't known",
        "The best option is to walk home.",
        r"So \boxed{72} is what we had. Then we went on.",
        "",
    ],
)
def test_what_is_no_closing_statement_stays(text):
    assert strip_closing(text) == (text, None, False)


def test_box_inside_a_sentence_is_opened_and_the_sentence_stays():
    assert strip_closing(r"First 4. The total is $4+5=\boxed{9}$.") == ("First 4. The total is $4+5=9$.", "9", True)


@pytest.mark.parametrize(
    "lead", ["This means that", "We can conclude that", "I'm confident that", "Therefore, we find that", "I am sure"]
)
def test_what_leads_to_a_closing_goes_with_it(lead):
    assert strip_closing(f"So x = 5. {lead} the answer is 5.") == ("So x = 5.", "5", True)
    assert strip_closing(f"It has 5, {lead.lower()} the answer is 5.")[0] in ("It has 5", f"It has 5, {lead.lower()}")


@pytest.mark.parametrize(
    "more",
    ["3:2", "1:30", "10 : 7", "1.5 million", "2 dozen", "3 hours 20 minutes", "between 5 and 7", "10-12", "1.234,50 €"]
    + ["2^{100}", "10³", "1e1000", "2 1/2 × 10^3", "1_000", "5k", "√5", "sqrt(2)", "2pi", "0x1F", "5 squared"],
)
def test_what_is_more_than_one_number_is_no_number(more):
    assert not is_answer(more, "number") and is_answer(more, "text")


@pytest.mark.parametrize(
    "one",
    [
        "48 eggs",
        "$1,234.50",
        "72 (n = 3)",
        "48 eggs (4 dozen)",
        "3/4",
        "2½",
        "5+3 = 8",
        "12 cm^2",
        "25 m²",
        "90^\\circ",
    ],
)
def test_one_number_with_what_belongs_to_it_is_a_number(one):
    assert is_answer(one, "number")


def test_last_of_several_closings_speaks():
    assert strip_closing("Add. The answer is 5.\n#### 7")[1] == "7"


@pytest.mark.parametrize(
    "a, b, kind, same",
    [
        ("72.0", "72", "number", True),
        ("$1,234", "1234", "number", True),
        ("50%", "50", "number", True),
        ("72.", "72", "number", True),
        ("1/2", "0.5", "number", True),
        ("2 1/2", "2.5", "number", True),
        (r"\frac{1}{2}", "0.5", "number", True),
        (r"2\frac{1}{2}", "2.5", "number", True),
        ("-2 1/2", "-2.5", "number", True),
        ("-2 1/2", "2.5", "number", False),
        ("2e3", "2000", "number", True),
        ("1e5", "1e6", "number", False),
        ("−5", "-5", "number", True),
        ("- 10", "-10", "number", True),
        ("72 dollars", "72", "number", True),
        ("5+3 = 8", "8", "number", True),
        ("10:30", "10", "number", False),
        ("72", "73", "number", False),
        ("2 1/2", "2", "number", False),
        ("72", "", "number", False),
        ("(c)", "C", "choice", True),
        ("C) the bank", "C", "choice", True),
        ("Cow", "C", "choice", False),
        ("a bank", "A", "choice", False),
        ("A bank", "A", "choice", False),
        ("I think so", "I", "choice", False),
        ("b the bank", "B", "choice", False),
        ("B the bank", "B", "choice", True),
        ("A: a bank", "a", "choice", True),
        ("option a", "A", "choice", True),
        ("A because it is", "A", "choice", True),
        ("A", "B", "choice", False),
        ("Yes.", "yes", "yesno", True),
        ("No, it is not", "no", "yesno", True),
        ("True", "yes", "yesno", True),
        ("yes", "no", "yesno", False),
        ("The  Hague.", "the hague", "text", True),
        ("Hague", "Paris", "text", False),
    ],
)
def test_answers_are_compared_by_their_kind(a, b, kind, same):
    assert same_answer(a, b, kind) is same
    assert same_answer(b, a, kind) is same


@pytest.mark.parametrize(
    "text, kind, strict, flexible",
    [
        ("12 and 3.\n#### 1,234", "number", "1234", "1234"),
        ("The answer is $5.50. Then 7", "number", "5.50", "7"),
        ("so 3 and -4.", "number", None, "-4"),
        ("no digits", "number", None, None),
        ("The answer is 1/2.", "number", "1/2", "1/2"),
        ("The answer is 2 1/2.", "number", "5/2", "5/2"),
        ("The answer is 5 × 10^3 m.", "number", "5e3", "5e3"),
        ("The answer is $-5$.", "number", "-5", "-5"),
        ("Answer: \\[ \\boxed{-5} \\]", "number", "-5", "-5"),
        ("so \\boxed{5} of 6", "number", "5", "6"),
        ("so \\boxed{x} of 6", "number", None, "6"),
        ("The answer is b.", "choice", "B", "B"),
        ("The answer is i.e. option (B).", "choice", None, "B"),
        ("The answer is Martin Luther King Jr. He was", "text", "Martin Luther King Jr", "Martin Luther King Jr"),
        ("The answer is St. Louis. It", "text", "St. Louis", "St. Louis"),
        ("The answer is (C).", "choice", "C", "C"),
        ("The answer is **B**", "choice", "B", "B"),
        ("The answer is a dog", "choice", None, None),
        ("The answer is A dog", "choice", None, None),
        ("The answer is I think so", "choice", None, None),
        ("The answer is option A dog", "choice", "A", "A"),
        ("The answer is A\nQuestion: B?", "choice", "A", "A"),
        ("A cow, so I pick B.", "choice", None, "B"),
        ("The answer is: no. Yes.", "yesno", "no", "no"),
        ("Yes", "yesno", None, "yes"),
        (r"so $\boxed{\frac12}$ it is", "math", r"\frac12", r"\frac12"),
        ("The answer is $x^2$.", "math", "x^2", "x^2"),
        ("we get $x+1$", "math", None, "x+1"),
        ("The answer is The Hague. It", "text", "The Hague", "The Hague"),
        ("First\nThe Hague.", "text", None, "The Hague"),
    ],
)
def test_extraction(text, kind, strict, flexible):
    assert extract(text, kind, strict=True) == strict
    assert extract(text, kind, strict=False) == flexible


def test_canonical_leaves_what_it_does_not_know():
    assert canonical("we cannot know.", "number") == "we cannot know"


def test_gold_answers_are_checked_to_be_of_their_kind():
    assert is_answer("1,234", "number") and not is_answer("C", "number")
    assert is_answer("(C)", "choice") and not is_answer("72", "choice") and not is_answer("a bank", "choice")
    assert is_answer("Yes", "yesno") and not is_answer("maybe", "yesno")


def test_math_goes_through_math_verify():
    pytest.importorskip("math_verify")
    assert same_answer(r"\frac{1}{2}", "0.5", "math")
    assert same_answer("x^2+1", "1+x^2", "math")
    assert not same_answer("2", "3", "math")
    assert same_answer(r"\$18.90", "18.90", "math")  # as MATH writes money
    result = []
    thread = threading.Thread(target=lambda: result.append(same_answer("2x", "x+x", "math")))
    thread.start()
    thread.join()
    assert result == [True]  # its time limit is a signal, which only the main thread may set


def test_missing_math_verify_is_named_with_the_way_out(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "math_verify":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match="pip install math-verify"):
        same_answer("1", "2", "math")


def test_unknown_kind_suggests_the_nearest():
    with pytest.raises(UserError, match="did you mean 'number'"):
        same_answer("1", "2", "numbr")


@pytest.mark.parametrize(
    ("kind", "one", "other", "same"),
    [
        ("number", "72", "72 (n = 3)", True),
        ("number", "72", "72, since x = 6", True),
        ("number", "72", "72 = 6*12", True),
        ("number", "72", "6*12 = 72", True),
        ("number", "0.5", r"\boxed{\frac12}", True),
        ("number", "2½", "2.5", True),
        ("number", "2½", "2", False),
        ("number", "1 / 2", "0.5", True),
        ("number", "–3", "-3", True),
        ("number", "–3", "3", False),
        ("number", "1e100", "1", False),
        ("number", "10^6", "1000000", True),
        ("number", r"$5 \times 10^{3}$", "5000", True),
        ("number", "1.5 × 10⁶ m", "1,500,000", True),
        ("number", "2 x 10^-3", "0.002", True),
        ("number", "3.1 × 10", "31", False),
        ("number", "1 234 567", "1234567", True),
        ("number", "1,234 1/2", "1234.5", True),
        ("choice", "C", "Option C", True),
        ("choice", "C", r"\boxed{\textbf{(C)}\ 5}", True),
        ("yesno", "yes", r"\boxed{\text{Yes}}", True),
        ("math", "10", r"10!", False),
        ("math", "10!", r"\boxed{10!}", True),
        ("text", "Caf\u00e9", "Cafe\u0301", True),
        ("text", "It's", "It’s", True),
    ],
)
def test_one_value_in_many_forms(kind, one, other, same):
    if kind == "math":
        pytest.importorskip("math_verify")
    assert same_answer(one, canonical(other, kind), kind) is same


@pytest.mark.parametrize("name", ["St. Louis", "J. R. R. Tolkien", "U.S. Navy"])
def test_names_with_full_stops_are_read_whole(name):
    assert strip_closing(f"It is there. The answer is {name}.") == ("It is there.", name, True)
    assert extract(f"So.\nThe answer is {name}.", "text", strict=True) == name


@pytest.mark.parametrize("text", ["\\boxed{" * 20_000, "\n" * 200_000 + "x", "1" * 5000 + " 1/2"])
def test_what_a_looping_student_writes_is_read(text):
    """In steps that grow with its length: with the square of it this would take hours."""
    assert strip_closing(text)[0] and isinstance(canonical(text, "number"), str)
    extract(text, "math", strict=False)
