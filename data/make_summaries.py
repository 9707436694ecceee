"""The summaries of the runs on CIFAR-10 that are shipped: ``python data/make_summaries.py`` in the repository's root.

Needs CIFAR-10 and the checkpoints of ``python data/make_runs.py cifar10``. The studies of a run share a store in
``build/cifar10``, so that a second call goes on where the first was stopped; what ships is written beside the study:
the netCDF ``<study>.nc``, the store ``<study>.store``, or both. The stores' directions are left out: u is as large as
the network.
"""

import argparse
import shutil
from pathlib import Path

import torch

import hoanalysis as ho
from hoanalysis.store import Store, export
from hoanalysis.store.container import digest_of
from hoanalysis.study import StudySpec

HERE = Path(__file__).parent
BUILD = HERE.parent / "build" / "cifar10"
#: Study -> what is shipped of it.
STUDIES = {
    "lenet5-cifar10/study": (".store",),
    "lenet5-cifar10/third": (".store",),
    "lenet5-cifar10-seed1/study": (".nc",),
    "lenet5-cifar10-seed2/study": (".nc",),
    "lenet5-cifar10-tanh/study": (".nc",),
    "vgg11-cifar10/study": (".store", ".nc"),
    "vgg11-cifar10/third": (".nc",),
}


def summarized(name: str) -> None:
    """Compute one study, and write what is shipped of it."""
    spec = StudySpec.read(HERE / f"{name}.toml")
    store, ours = BUILD / spec.folder.name, HERE / name  # studies of one run share the gradients
    (settings,) = spec.settings()
    ds = ho.summarize_run(spec.run(), spec.problem(), store=store, **settings)
    if ".nc" in STUDIES[name]:
        export(ds, ours.with_suffix(".nc"))
    if ".store" in STUDIES[name]:
        ship(store, ours.with_suffix(".store"))
    print(f"{name}: {ds.sizes['step']} checkpoints over {ds.attrs['n_samples']} images", flush=True)


def ship(store: Path, target: Path) -> None:
    """A store of the newest plan and its units, without directions and older plans."""
    shutil.rmtree(target, ignore_errors=True)
    with Store.open(store) as source, Store.open(target, mode="w") as copy:
        for name in source.plan_names():
            plan = source.plan(name)
            assert plan is not None
            copy.register(name, plan)
            for step in plan["steps"]:
                for key in step["units"]:
                    file = f"units/{digest_of(key)}.unit"
                    shutil.copyfile(store / file, target / file)
    (target / "lock").unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("studies", nargs="*", choices=[[], *STUDIES], help="all of them, without")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    for name in given.studies or STUDIES:
        summarized(name)


if __name__ == "__main__":
    main()
