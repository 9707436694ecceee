"""Which engine takes which model, how exactly, and how fast: ``python benchmarks/architectures.py``.

Every model is small, in float64, with one batch; D1, D2 and D3 by the engine that ``engine="auto"`` may take are
compared with nested reverse mode, and the largest difference in units of the largest entry is the error. Where
`transformers` is installed, all of its language, sequence and image models that can be built from their configuration
within ten seconds are tried as well; nothing is downloaded. The table goes to ``docs/architectures.md``.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import io
import json
import multiprocessing
import os
import resource
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import hoanalysis as ho  # noqa: E402
from hoanalysis.errors import HoError  # noqa: E402
from tests.derivatives.cases_models import MODELS  # noqa: E402
from tests.derivatives.cases_tangents import ARCHITECTURES  # noqa: E402

GROUPS = 4  # blocks of layers
SECONDS = 60  # for one model with both engines
BUILD = 10.0  # seconds in which a model of transformers has to be there
LARGEST = 2_000_000  # parameters
MEMORY = 6 * 2**30  # bytes of address space beyond the start, so that a model which does not shrink ends alone
EXACT, CAST = 1e-10, 1e-5  # float64 throughout, and where the model itself casts to float32

Built = tuple[torch.nn.Module, Any, Callable[[torch.nn.Module, Any], torch.Tensor]]


# ---- our own --------------------------------------------------------------------------------------------------------


def own() -> dict[str, Callable[[], Built]]:
    """The models of the tests."""

    def architecture(name: str) -> Built:
        case = ARCHITECTURES[name]()
        return case.model, case.batch, lambda m, b: case.loss(m(b[0]), b[1])

    found: dict[str, Callable[[], Built]] = {n: lambda n=n: architecture(n) for n in ARCHITECTURES}  # type: ignore[misc]
    return {**found, **MODELS}


# ---- transformers ---------------------------------------------------------------------------------------------------

#: What a configuration may call its sizes, and what they are here.
SIZES = {
    "hidden_size": 16, "d_model": 16, "n_embd": 16, "dim": 16, "embed_dim": 16, "embedding_size": 16,
    "word_embed_proj_dim": 16, "num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_layers": 2,
    "encoder_layers": 2, "decoder_layers": 2, "num_attention_heads": 2, "num_heads": 2, "n_head": 2, "n_heads": 2,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "d_kv": 8,
    "intermediate_size": 24, "hidden_dim": 24, "n_inner": 24, "d_inner": 24, "d_ff": 24, "ffn_dim": 24,
    "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "ffn_hidden_size": 24, "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
    "v_head_dim": 8, "rotary_dim": 4, "state_size": 4, "time_step_rank": 4, "vocab_size": 48, "type_vocab_size": 2,
    "max_position_embeddings": 32, "n_positions": 32, "n_ctx": 32, "image_size": 32, "patch_size": 8,
    "num_channels": 3, "depths": [1, 1], "hidden_sizes": [8, 16], "num_labels": 3, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "use_cache": False, "hidden_dropout": 0.0, "attention_dropout": 0.0,
}  # fmt: skip
#: Without which a configuration may be content, tried in turn.
OPTIONAL: tuple[tuple[str, ...], ...] = (
    (),
    ("depths", "hidden_sizes"),
    ("num_key_value_heads",),
    ("pad_token_id", "bos_token_id", "eos_token_id"),
    ("qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim", "kv_lora_rank", "q_lora_rank", "head_dim"),
    ("num_heads", "embed_dim", "depths", "num_attention_heads"),
)
HEADS = {
    "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "AutoModelForMaskedLM": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "AutoModelForSeq2SeqLM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "AutoModelForSequenceClassification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "AutoModelForImageClassification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
}


class NotBuilt(Exception):
    """The model could not be made this small, or not in time: no statement about an engine."""


def hugging_face() -> dict[str, Callable[[], Built]]:
    """Every kind of model of transformers that has one of the `HEADS`."""
    try:
        from transformers.models.auto import configuration_auto, modeling_auto
    except ImportError:
        return {}
    known = {name: getattr(modeling_auto, mapping) for name, mapping in HEADS.items()}
    kinds = [k for k in configuration_auto.CONFIG_MAPPING_NAMES if any(k in names for names in known.values())]
    return {f"transformers: {k}": lambda k=k: tiny(k) for k in kinds}  # type: ignore[misc]


def tiny(kind: str) -> Built:
    """A model of random weights, its batch, and its own loss."""
    import transformers

    start = time.monotonic()
    config = _config(transformers.CONFIG_MAPPING[kind])
    reasons = []
    for head in HEADS:
        auto = getattr(transformers, head)
        if type(config) not in auto._model_mapping:
            continue
        with contextlib.suppress(Exception):
            config._experts_implementation = "eager"  # the fused ones take no float64
        try:
            torch.manual_seed(0)
            model = auto.from_config(config).double().eval()
            batch = _batch(head, model.config)
            loss = model(**batch).loss
        except Exception as error:
            reasons.append(f"{type(error).__name__}: {str(error)[:100]}")
            continue
        if time.monotonic() - start > BUILD:
            raise NotBuilt("slow")
        if sum(p.numel() for p in model.parameters()) > LARGEST or not torch.isfinite(loss):
            raise NotBuilt("too large, or a loss that is not finite")
        return model, batch, lambda m, b: m(**b).loss
    raise NotBuilt("; ".join(reasons))


def _config(kind: type) -> Any:
    base, reasons = kind(), []
    for left_out in OPTIONAL:
        wanted = {k: v for k, v in SIZES.items() if hasattr(base, k) and k not in left_out}
        try:
            return kind(**wanted)
        except Exception as error:
            reasons.append(f"{type(error).__name__}: {str(error)[:80]}")
    raise NotBuilt(reasons[0])


def _batch(head: str, config: Any) -> dict[str, torch.Tensor]:
    seed = torch.Generator().manual_seed(1)
    if head == "AutoModelForImageClassification":
        size = getattr(config, "image_size", 32)
        size = size if isinstance(size, int) else size[0]
        shape = 2, getattr(config, "num_channels", 3), size, size
        images = torch.randn(shape, generator=seed, dtype=torch.float64)
        return {"pixel_values": images, "labels": torch.tensor([0, 1])}
    tokens = torch.randint(3, config.vocab_size, (2, 8), generator=seed)
    if head == "AutoModelForSequenceClassification":
        return {"input_ids": tokens, "labels": torch.tensor([0, 1])}
    if head == "AutoModelForSeq2SeqLM":
        config.decoder_start_token_id = 1
        return {"input_ids": tokens, "labels": torch.randint(3, config.vocab_size, (2, 6), generator=seed)}
    return {"input_ids": tokens, "labels": tokens}


# ---- the comparison -------------------------------------------------------------------------------------------------


def compared(build: Callable[[], Built]) -> dict[str, Any]:
    """One row: the engine, its error, the seconds of both, and why it was not tangents."""
    torch.manual_seed(0)
    try:
        model, batch, loss = build()
    except NotBuilt:
        raise
    except Exception as error:
        raise NotBuilt(f"{type(error).__name__}: {str(error)[:100]}") from error
    problem = ho.Problem(model, [batch], batch_loss=loss, batch_size=lambda _: 1.0)
    partition = ho.Partition.blocks(model, min(GROUPS, len(ho.Partition.canonical(model))))
    row: dict[str, Any] = {"parameters": sum(p.numel() for p in model.parameters())}

    def summaries(engine: str) -> tuple[Any, float]:
        options: dict[str, Any] = {
            "partition": partition,
            "self_check": False,
            "progress": False,
            "direction": "random",
        }
        ho.summarize(problem, 3, engine=engine, **options)  # captures, and warms up
        start = time.perf_counter()
        return ho.summarize(problem, 3, engine=engine, **options), time.perf_counter() - start

    expected, row["nested"] = summaries("nested")
    try:
        found, row["tangents"] = summaries("tangents")
        row["engine"] = "tangents"
    except HoError as error:
        row |= {"engine": "nested", "reason": str(error.why)}
        return row
    sizes = {d: float(abs(expected[d]).max()) for d in ("D1", "D2", "D3")}
    row["error"] = max(float(abs(found[d] - expected[d]).max()) / s if s else 0.0 for d, s in sizes.items())
    row["casts"] = any(p in found.engine_detail.item() for p in ("float32",)) or row["error"] > EXACT
    return row


def guarded(task: tuple[str, Callable[[], Built]]) -> dict[str, Any]:
    """`compared` within its time, with every failure as a row of its own."""

    def late(*_: Any) -> None:
        raise TimeoutError(f"longer than {SECONDS} s")

    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64 if not task[0].startswith("transformers") else torch.float32)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            row = compared(task[1])
    except NotBuilt as error:
        row = {"engine": "not built", "reason": str(error)}
    except BaseException as error:
        row = {"engine": "failed", "reason": f"{type(error).__name__}: {str(error)[:300]}"}
    signal.alarm(0)
    return {"model": task[0], **row}


_TASKS: dict[str, Callable[[], Built]] = {}


def _by_name(name: str) -> dict[str, Any]:
    return guarded((name, _TASKS[name]))


def rows(names: list[str]) -> Iterator[dict[str, Any]]:
    """One fresh process for each model: what a library registers or breaks stays there."""
    with multiprocessing.get_context("fork").Pool(os.cpu_count(), maxtasksperchild=1) as pool:
        yield from pool.imap(_by_name, names, chunksize=1)


# ---- the page -------------------------------------------------------------------------------------------------------


def verdict(row: dict[str, Any]) -> str:
    if row["engine"] != "tangents":
        return row["engine"]
    return "exact" if row["error"] <= EXACT else "float32" if row["error"] <= CAST else "WRONG"


def page(found: list[dict[str, Any]]) -> str:
    """The table, the counts, and what was not built."""
    theirs = [r for r in found if r["model"].startswith("transformers")]
    out = [HEADER.strip(), ""]
    for title, part in (("Of this project's tests", [r for r in found if r not in theirs]), ("transformers", theirs)):
        tried = [r for r in part if r["engine"] != "not built"]
        counts = collections.Counter(verdict(r) for r in tried)
        out += [f"## {title}", "", ", ".join(f"{n} {kind}" for kind, n in counts.most_common()) or "none", ""]
        out += [
            "| model | parameters | engine | error | tangents, ms | nested, ms | reason |",
            "|---|---|---|---|---|---|---|",
        ]
        out += [_line(r) for r in tried]
        if skipped := [r["model"].removeprefix("transformers: ") for r in part if r["engine"] == "not built"]:
            out += ["", f"Not built this small or within {BUILD:g} s, and not counted: {', '.join(skipped)}."]
        out.append("")
    return "\n".join(out)


def _line(row: dict[str, Any]) -> str:
    def ms(key: str) -> str:
        return f"{1e3 * row[key]:.0f}" if key in row else ""

    cells = [
        row["model"].removeprefix("transformers: "),
        f"{row['parameters']:,}" if "parameters" in row else "",
        verdict(row),
        f"{row['error']:.0e}" if "error" in row else "",
        ms("tangents"),
        ms("nested"),
        str(row.get("reason", "")).replace("|", "/").replace("\n", " ")[:160],
    ]
    return f"| {' | '.join(cells)} |"


HEADER = """
# Which models the engine takes

Made by `python benchmarks/architectures.py`. Small models in float64, one batch, four groups of layers, along a random
direction. *error* is the largest difference of D1, D2 and D3 from nested reverse mode, in units of the largest entry of
each. *exact*: at most 1e-10. *float32*: at most 1e-5, because the model itself computes a part of its loss in single
precision. *nested*: taken by the nested engine alone, with the reason. Times are warm calls on one core, under whatever
else the machine was doing; with four groups nested has little to do, so that they say what small models cost, not what
large ones gain.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="models whose name contains this")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "architectures.md")
    parser.add_argument(
        "--rows", type=Path, default=None, help="keep the rows here, and go on from those that are there"
    )
    arguments = parser.parse_args()
    _ = ho.summarize  # loads what the processes share
    _TASKS.update({**own(), **hugging_face()})
    kept = arguments.rows.read_text().splitlines() if arguments.rows and arguments.rows.exists() else []
    found = [json.loads(line) for line in kept]
    done = {row["model"] for row in found}
    for row in rows([n for n in _TASKS if arguments.only in n and n not in done]):
        found.append(row)
        print(json.dumps(row), flush=True)
        if arguments.rows:
            with arguments.rows.open("a") as stream:
                stream.write(json.dumps(row) + "\n")
    late = sorted(set(_TASKS) - {row["model"] for row in found})
    told = f"Not reached: {', '.join(n.removeprefix('transformers: ') for n in late)}.\n" if late else ""
    arguments.out.write_text(page(found) + told)
    wrong = [r["model"] for r in found if verdict(r) == "WRONG"]
    if wrong:
        sys.exit(f"wrong: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
