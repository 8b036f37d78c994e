"""report.md: the numbers of a run, for a reader."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from compact.data_report import told_trained_on
from compact.results import SPLITS

MISSING = "not measured"


def markdown(content: Mapping[str, Any], recipe: str, pictures: Mapping[str, str]) -> str:
    """report.md from the content of report.json, the recipe's text and the pictures' paths."""
    parts = [
        f"# {content['run']}",
        _opening(content),
        *([f"> **Note.** {content['note'].strip()}"] if content["note"] else []),
        "## Accuracy",
        *_accuracy(content["accuracy"]),
        *_drift(content["drift"]),
        *(f"**{told}.**" for told in told_trained_on(content.get("trained_on") or {})),
        "## Teachers",
        *_teachers(content),
        *(["## Inside the student", *_states(content["states"])] if content["states"] else []),
        *(["## Gradient norms", *_influence(content["influence"])] if content["influence"] else []),
        *(["## Information", *_information(content)] if content["information"] else []),
        "## Pictures",
        *_pictures(content, pictures),
        "## Data",
        *_data(content),
        "## Cost",
        *_cost(content),
        "## Recipe",
        f"<details><summary>recipe.yaml</summary>\n\n```yaml\n{recipe.strip()}\n```\n\n</details>",
        "`python -m compact.evaluate RUN` repeats the evaluation, `python -m compact.analyze RUN` this report.",
        "## Versions",
        table(["", ""], [[name, value] for name, value in content["versions"].items()]),
    ]
    return "\n\n".join(parts) + "\n"


def _opening(content: Mapping[str, Any]) -> str:
    teachers = list(content["alpha_mean"])
    of = f"{len(teachers)} teachers ({', '.join(teachers)})" if len(teachers) > 1 else "one teacher"
    text = f"Student `{content['student']}`, strategy `{content['strategy']}`, {of}"
    if content["steps"] is not None:
        text += f"; {content['steps']:,} steps, {content['epochs']:.3g} epochs"
    if content["seconds"] is not None:
        text += f", {duration(content['seconds'])} on {content['versions'].get('device', 'an unknown device')}"
    return text + ("." if content["finished"] else ". **The run is not finished.**")


def _accuracy(tasks: Mapping[str, Any]) -> list[str]:
    if not tasks:
        return [f"Accuracy: {MISSING}."]
    rows, scores = [], []
    for name, task in tasks.items():
        before, after, changes = task["summary"]["before"], task["summary"]["after"], task.get("changes")
        change = flips = p_value = MISSING
        if changes:
            change = f"{_signed(100 * changes['change'])} ± {100 * changes['standard_error']:.1f}"
            flips = f"{changes['forgotten']} / {changes['gained']}"
            if "forgotten_by_luck" in changes:
                flips += f" (luck alone: up to {changes['forgotten_by_luck']:.0f} / {changes['gained_by_luck']:.0f})"
            p_value = f"{changes['p_value']:.2g}"
        rows.append(
            [name, SPLITS[task["split"]], task["n"], _share(before), _share(after), change, flips, p_value]
            + [_strict(before, after)]
        )
        scores.append(
            [name]
            + [_logprob(summary, key) for key in ("answer_logprob", "solution_logprob") for summary in (before, after)]
            + [_percent(before, "finished"), _percent(after, "finished")]
        )
    names = ["task", "split", "n", "before, %", "after, %", "change", "forgotten / gained", "p", "strict, %"]
    score_names = ["task", "answer, before", "answer, after", "solution, before", "solution, after"]
    score_names += ["answers that ended, before", "after"]
    smallest = min(task["n"] for task in tasks.values())
    return [
        table(names, rows),
        "± is one standard error: binomial for an accuracy, of paired answers for a change. With "
        f"n = {smallest}{' in the smallest task' if len(tasks) > 1 else ''}, an accuracy near 50% is known to "
        f"± {98 / smallest**0.5:.0f} points (95%); a change of less than two of its standard errors may be chance. "
        "Read is the last number of an answer; where letters or yes/no are asked for, what it states, else the last "
        "one. What a student writes after its answer may so be taken for it, before training more often than after "
        "(*answers that ended*); *strict* counts what is stated first alone. Forgotten: right before and wrong after; "
        "gained: the other way round; p: McNemar's exact test. *Luck alone* is how many flips fresh guesses "
        "would make (an upper bound: greedy guesses repeat).",
        "Log-probability a token (natural logarithm) of the gold answer after prompt and “The answer is”, and "
        "of the reference solution after the prompt; these move where accuracy is at the floor:",
        table(score_names, scores),
    ]


def _drift(drift: Mapping[str, Any] | None) -> list[str]:
    if not drift:
        return []
    kl = drift["kl"]
    return [
        f"How far the student has moved on held text ({count(kl['n'])} texts of `{drift['text']}`): "
        f"KL(before ‖ after) is {number(kl['mean'], 4)} ± {number(kl['standard_error'], 4)} nats a token."
    ]


def _equal(content: Mapping[str, Any]) -> float | None:
    """What α would be if all weighed the same; None where that is not the same for all teachers."""
    known = {round(value, 3) for value in content.get("equal", {}).values() if value is not None}
    if len(known) > 1:
        return None
    return known.pop() if known else 1 / max(1, len(content["alpha_mean"]))


def _teachers(content: Mapping[str, Any]) -> list[str]:
    if not content["alpha_mean"]:
        return [f"Teachers: {MISSING}."]
    equal = _equal(content)
    apart = [] if equal is not None else ["if equal"]  # some questions lack some teachers
    rows = [
        [name, number(alpha, 3), *(number(content["equal"][name], 3) for _ in apart)]
        + [number(value, 3) for value in content["teachers"][name].values()]
        for name, alpha in content["alpha_mean"].items()
    ]
    rows.append(
        [
            "*spread within a question*",
            "",
            *("" for _ in apart),
            *(number(value, 3) for value in content["spread"].values()),
        ]
    )
    entropy = number(content["alpha_entropy"], 2)
    columns = {
        "adaptability": "S_MI (adaptability)",
        "consensus": "S_cons (consensus)",
        "difficulty": "S_PPL (difficulty)",
        "influence": "u (gradient norm)",
        "own_norm": "n (before α)",
    }
    some = content.get("steps_with_norms")
    norms = (
        f" Norms of {some:,} measured steps, the last quarter of these." if some and some < content["steps"] else ""
    )
    told = f"Equal weights would be {number(equal, 3)}."
    if equal is None:
        told = "Teachers are missing from some questions: *if equal* is what α would be if those there weighed alike."
    scores = ""
    if content["strategy"] == "compact":
        scores = (
            " Weights come from z-scores within a question, so they tell the order of the teachers and not how far "
            "apart they are: the spread (standard deviation, raw) tells that."
        )
    said = [f"{name} {f'{value:.3g}'.replace('-', '−')}" for name, value in content["strategy_logs"].items()]
    effective = [number(content["effective_teachers"][when], 2) for when in ("first_tenth", "last_tenth")]
    return [
        table(["teacher", "α", *apart, *(columns[name] for name in next(iter(content["teachers"].values())))], rows),
        f"Means over the last quarter of training. {told} Entropy of α: {entropy} nats. α is worth {effective[0]} "
        f"teachers of equal weight in the first tenth of the steps and {effective[1]} in the last (1: it has "
        f"collapsed onto one).{scores}{norms}",
        *([f"The strategy's own last figures: {', '.join(said)}."] if said else []),
    ]


def _states(content: Mapping[str, Any]) -> list[str]:
    """What :func:`compact.states.read_states` found."""
    chance = content.get("cka_of_chance", {})  # not in what an older version wrote
    shuffled = [number(chance.get(layer), 3) for layer in ("pooled", "last")]
    lines = [
        f"Both students read the same {content['questions']} questions with all their rationales. Linear CKA of the "
        f"mean states, before against after: {number(content['cka']['pooled'], 3)}, of the last states "
        f"{number(content['cka']['last'], 3)} (1: the same up to rotation and scale; chance, with the rationales "
        f"shuffled: {shuffled[0]} and {shuffled[1]}). The centre moved by "
        f"{number(content['pca_shift']['pooled'], 2)} spreads in the main plane of the states before.",
    ]
    rows = [
        [when, *(number(values[name], 3) for name in ("peaks", "sharpest", "rise"))]
        for when, values in content["trajectories"].items()
    ]
    lines.append(
        table(
            ["", f"jumps of the evidence above {content['peak']} nats", "largest jump, nats", "whole rise, nats"], rows
        )
    )
    lines.append(
        "What each metric does to each teacher, after training: mean of its z-score as it enters the score (eq. 7), "
        "and the α of COMPACT's rule. Positive raises the weight."
    )
    names = ["adaptability", "consensus", "difficulty"]
    rows = [
        [name, f"{100 * of['wrong']:.0f}%", *(number(of["after"][f"z_{m}"], 2) for m in names)]
        + [number(of["after"]["alpha"], 3)]
        for name, of in content["teachers"].items()
    ]
    lines.append(table(["teacher", "wrong answers", *names, "α"], rows))
    finds = [
        [when, *(number(values[m], 2) for m in (*names, "alpha"))] for when, values in content["finds_wrong"].items()
    ]
    lines.append(
        "How often a right rationale scores above a wrong one (0.50 is chance, below it the metric misleads):"
    )
    lines.append(table(["", *names, "α"], finds))
    return lines


def _influence(content: Mapping[str, Any]) -> list[str]:
    """What :func:`compact.influence.read_influence` found."""
    rows, means = [], []
    for when in ("before", "after"):
        of = content[when]
        rows.append([when, number(of["length"], 2)])
        for pair in of["correlations"].values():
            rows[-1].append(" / ".join(number(value, 2) for value in pair.values() if value is not None))
        rows[-1].append(number(of["alpha_and_influence"], 2))
    for name, of in content["after"]["teachers"].items():
        means.append([name, *(number(of[key], 3) for key in ("tokens", "n", "n_without_length", "alpha", "u"))])
    return [
        f"n: the norm of a rationale's own gradient, u: of what flows under α ({content['questions']} questions). "
        "Rank correlations of n, each as it is / with length partialled out / with length and loss:",
        table(["", "length", "loss", "S_MI", "wrong answer", "α and u"], rows),
        table(["teacher", "tokens", "n", "n's rank without length (0: as expected)", "α", "u"], means),
    ]


def _information(content: Mapping[str, Any]) -> list[str]:
    found = content["information"]
    share = f"{100 * found['seconds'] / content['seconds']:.1f}% of the run" if content["seconds"] else "time"
    rows = [[name, *(number(value, 4) for value in of.values())] for name, of in found["teachers"].items()]
    hsic = MISSING if found["hsic"] is None else f"{found['hsic']:.3g}"
    return [
        f"{found['measurements']} measurements took {found['seconds']:.1f} s ({share}). Means over the last quarter; "
        f"unbiased HSIC between the questions' mean states and answers: {hsic} (0 where nothing depends).",
        table(["teacher", "S_MI", "mask shuffled", "another's answer", "PHSIC"], rows),
    ]


def _pictures(content: Mapping[str, Any], pictures: Mapping[str, str]) -> list[str]:
    if "" in pictures:
        return [pictures[""]]
    if not pictures:
        return [f"Nothing to draw: {MISSING}."]
    ours = content["strategy"] == "compact"
    made = "What the weights are made from" if ours else "COMPACT's metrics, which these weights are not made from"
    captions = {
        "accuracy": "Accuracy and log-probability of the gold answer, before and after training.",
        "weights": _weights_caption(content["alpha_mean"], _equal(content)),
        "loss": _loss_caption(content["loss"]),
        "statistics": f"{made}: each teacher's raw metrics, and how even the weights are.",
        "trajectory": "One question: how sure the student is of the gold answer as it reads each rationale. A rise is "
        "what adaptability rewards, most of all at thinking tokens.",
        "latent": "Mean states of the same rationales before and after training, in the main plane of those before.",
        "tsne": "The last states of the same rationales, before and after training, by t-SNE.",
        "metrics": "What each metric adds to a teacher's score (mean z-score, signed as in eq. 7), before and after. "
        "Bars: two standard errors.",
        "evidence": "Jumps of the evidence along each teacher's rationales, before and after: how many, how large, "
        "and what all of them come to. Bars: two standard errors.",
        "influence": "Left what the rule gives each teacher, right what moves the student: the norm of the gradient "
        "that flowed through its rationales. The two need not agree.",
        "norms": "A dot is a rationale, after training. Left: the norm of its own loss's gradient against its length. "
        "Right: what is left of norm and loss once length is taken out of both, as ranks.",
        "information": "Above: how the answer becomes known along a rationale, by the logit-lens proxy and by PHSIC, "
        "over the last quarter of training. Below: how far S_MI is above its controls; at 0 it says nothing.",
        "consensus": "The same question's consensus graph: the wider an arrow, the more the rationale at its tail "
        "attends to the one at its head; the larger a node, the more the others agree with it (the number in it).",
    }
    lines = [f"![{name}]({path})\n\n*{captions[name]}*" for name, path in pictures.items()]
    if "latent" in pictures and "tsne" not in pictures:
        lines.append("No picture by t-SNE: scikit-learn is not installed (`pip install scikit-learn`).")
    return lines


def _weights_caption(alphas: Mapping[str, float | None], equal: float | None) -> str:
    known = {name: alpha for name, alpha in alphas.items() if alpha is not None}
    if len(known) < 2:
        return "Weight of the teacher over training."
    most, least = max(known, key=lambda name: known[name]), min(known, key=lambda name: known[name])
    if known[most] - known[least] < 0.005:
        return f"Weights over training: in the last quarter all weigh the same ({known[most]:.2f})."
    told = "teachers are missing from some questions" if equal is None else f"equal weights would be {equal:.2f}"
    return (
        f"Weights over training: in the last quarter {most} weighs most ({known[most]:.2f}) and {least} least "
        f"({known[least]:.2f}); {told}."
    )


def _loss_caption(loss: Mapping[str, Mapping[str, float | None]]) -> str:
    first, last = loss["first_tenth"], loss["last_tenth"]
    return (
        "The loss by component, from the first tenth of the steps to the last: rationales "
        f"{number(first['loss_sft'], 3)} → {number(last['loss_sft'], 3)}, disagreement "
        f"{number(first['loss_mcon'], 3)} → {number(last['loss_mcon'], 3)} (before λ)."
    )


def _data(content: Mapping[str, Any]) -> list[str]:
    counts = [
        ["questions", *(count(content["questions"].get(key)) for key in ("read", "used", "refused")), "", ""],
        [
            "rationales",
            *(count(content["rationales"].get(key)) for key in ("read", "used", "refused", "cut", "wrong")),
        ],
    ]
    parts = [table(["", "read", "used", "refused", "cut", "wrong answer"], counts)]
    unknown = content["rationales"].get("unrecognised_closings")
    if unknown:
        parts.append(f"{unknown:,} rationales had no closing statement that was recognised and taken off.")
    if content["refusals"]:
        reasons = [[why, f"{n:,}"] for why, n in content["refusals"].items()]
        parts.append(table(["refused or noted because", "times"], reasons))
        examples = content["refusal_examples"][:5]
        parts.append("For example:\n\n" + "\n".join(f"- {example}" for example in examples))
    elif content["refusals"] is not None:
        parts.append("Nothing was refused.")
    return parts


def _cost(content: Mapping[str, Any]) -> list[str]:
    memory = content["peak_memory_bytes"]
    speed = content["tokens_per_second"]
    rows = [
        ["seconds in all", number(content["seconds"], 1)],
        *([f"&nbsp;&nbsp;{phase}", number(value, 1)] for phase, value in (content["seconds_by_phase"] or {}).items()),
        ["tokens a second in training (median step)", f"{speed:,.0f}" if speed is not None else MISSING],
        ["peak memory", f"{memory / 2**30:.2f} GiB" if memory is not None else MISSING],
    ]
    return [table(["", ""], rows)]


def table(names: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table in Markdown; bars in cells are escaped."""
    lines = [names, ["---"] * len(names), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def number(value: float | None, digits: int) -> str:
    return MISSING if value is None else f"{value:.{digits}f}".replace("-", "−")


def count(value: int | None) -> str:
    return MISSING if value is None else f"{value:,}"


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _signed(value: float) -> str:
    return f"{value:+.1f}".replace("-", "−")


def _share(summary: Mapping[str, Any] | None) -> str:
    if summary is None:
        return MISSING
    return f"{100 * summary['accuracy']:.1f} ± {100 * summary['standard_error']:.1f}"


def _strict(before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> str:
    return " → ".join(MISSING if s is None else f"{100 * s['strict']['accuracy']:.1f}" for s in (before, after))


def _percent(summary: Mapping[str, Any] | None, key: str) -> str:
    return MISSING if summary is None else f"{100 * summary[key]:.0f}%"


def _logprob(summary: Mapping[str, Any] | None, key: str) -> str:
    if summary is None or summary[key]["mean"] is None:
        return MISSING if summary is None else "–"
    error = summary[key]["standard_error"]
    return f"{summary[key]['mean']:.3f}".replace("-", "−") + (f" ± {error:.3f}" if error is not None else "")
