"""A run over all ranks beside that of one process alone: what `generate` and `demo` print."""

from __future__ import annotations

from typing import Any

import torch
from rich.markup import escape
from rich.table import Table

from .common import console


def compare(job: dict[str, Any], ranks: dict[str, Any], alone: dict[str, Any] | None) -> dict[str, Any]:
    """Compare the run over all ranks with that of one process alone, if there was one; JSON values."""
    both = {"ranks": ranks} if alone is None else {"alone": alone, "ranks": ranks}
    report: dict[str, Any] = {
        "ranks": ranks["ranks"],
        "transport": ranks["transport"],
        "dtype": job["dtype"],
        "reproducible": job["reproducible"],
        "prompt_tokens": ranks["prompt_tokens"],
        "new_tokens": len(ranks["tokens"]),
        "tokens_identical": None,
        "largest_logit_difference": None,
        "logits_digest": ranks["logits_digest"] if job["reproducible"] else None,
        "kv_bytes_alone": alone and alone["kv_bytes"],
        "kv_bytes_per_rank": ranks["kv_bytes"],
        "wire_bytes_per_token": ranks["wire_bytes_per_token"],
        "threads": {who: run["threads"] for who, run in both.items()},
        "first_token_seconds": {who: run["first_token_seconds"] for who, run in both.items()},
        "tokens_per_second": {who: run["tokens_per_second"] for who, run in both.items()},
        "answer": ranks["answer"],
    }
    if alone is not None:
        one, other = alone["tokens"], ranks["tokens"]
        report["tokens_identical"] = ranks["same_on_every_rank"] and torch.equal(one, other)
        # Up to the first token that differs, both computed the logits of the same text.
        common = min(len(one), len(other))
        differ = (one[:common] != other[:common]).nonzero().flatten().tolist()
        steps = slice(0, differ[0] + 1 if differ else common)
        difference = (alone["logits"][steps].float() - ranks["logits"][steps].float()).abs().max()
        report["largest_logit_difference"] = float(difference)
    return report


def show(report: dict[str, Any]) -> None:
    """Print the comparison as a table, and the answer below it."""
    out, size, alone = console(), report["ranks"], report["kv_bytes_alone"]
    table = Table("", "one process alone", f"{size} ranks, {report['transport']}", title_justify="left", title="")
    table.title = (
        f"{report['prompt_tokens']:,} tokens of prompt, {report['new_tokens']} new tokens, {report['dtype']}"
    )

    def both(key: str, form: str) -> list[str]:
        return [form.format(report[key][who]) if who in report[key] else "" for who in ("alone", "ranks")]

    if alone:
        identical = "[green]yes[/]" if report["tokens_identical"] else "[bold red]no[/]"
        table.add_row("tokens identical", "", identical)
        table.add_row("largest logit difference", "", f"{report['largest_logit_difference']:.1e}")
    if report["reproducible"]:
        table.add_row("digest of all logits", "", report["logits_digest"] or "[bold red]differs between ranks[/]")
    most = max(report["kv_bytes_per_rank"])
    share = f" ({most / alone:.1%})" if alone else ""
    table.add_row("KV bytes per rank", f"{alone:,}" if alone else "", f"{most:,}{share}")
    table.add_row("bytes on the wire per token", "", f"{report['wire_bytes_per_token']:,.0f}")
    table.add_row("threads per process", *both("threads", "{}"))
    table.add_row("time to first token, seconds", *both("first_token_seconds", "{:.1f}"))
    table.add_row("tokens per second", *both("tokens_per_second", "{:.1f}"))
    out.print(table)
    out.print(f"\n{escape(report['answer'].strip())}")
