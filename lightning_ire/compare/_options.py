"""The command line of a comparison: its flags, its help, and one line for whatever is wrong with it."""

from __future__ import annotations

import argparse
import hashlib
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_ire._checks import ConfigurationError, check_choice
from lightning_ire._cli_options import Parser, behind, check_key, check_name, content, pairs
from lightning_ire.compare.design import BUDGETS, Choice, Design, Method, Range
from lightning_ire.sweeps._grid import SEED
from lightning_ire.sweeps._study import number

__all__ = ["Options", "read_options"]

_EXAMPLE = """\
example (SGD, SAM and SGD-IRE on the digits, 39 runs):
  python cli.py compare --config configs/digits_resnet_sgd_ire.yaml \\
    --method SGD --ire.kappa 0 \\
    --method SAM --ire.kappa 0 --ire.perturbation SAM \\
    --method SGD-IRE --ire.start_epoch 2 \\
    --tune model.optimizer.lr 0.02 1 log --tune ire.kappa 0.5 20 log --tune ire.perturbation.rho 0.02 0.5 log \\
    --trials 8 --seeds 5 --metric val/accuracy --jobs 2 -- --trainer.max_epochs 8

What follows `--method NAME`, up to the next option of this list, are flags of `cli.py fit` for this method alone; what
follows `--` is for all. The first method is the base that the others are compared with.
`--tune KEY LOW HIGH` is for all methods that have a use for the key: not those whose own flags set it, keys of a
perturbation for those with one, other keys of `ire` for those with kappa above 0; names behind it: for these methods.

The same command, typed again, goes on where it stopped, also with more --trials or --seeds; typed in a second terminal
it shares the work, and several machines share it with --storage postgresql+psycopg://USER:PASSWORD@HOST/DATABASE.
exit codes: 0; 1: runs failed; 2: a wrong key or value; 130: Ctrl-C"""


class Options(argparse.Namespace):
    """What the user asked for: the flags of the same names, the words of each method, and those behind `--`."""

    config: Path
    words: dict[str, list[str]]
    flags: list[str]
    name: str
    folder: Path
    storage: str
    jobs: int
    curve: str
    effect: float | None
    report_only: bool
    design: Design

    @property
    def logs(self) -> Path:
        """The folder of all runs, and of the report."""
        return self.folder / self.name

    @property
    def heading(self) -> str:
        """What was compared, for the report."""
        return f"{self.config.stem}" + (f", all with `{shlex.join(self.flags)}`" if self.flags else "")

    @property
    def fingerprint(self) -> str:
        """What must not change during a study: the config's text, all flags, and the design but for its size."""
        made = "\0".join([*self.flags, *(word for words in self.words.values() for word in words)])
        return hashlib.sha256(self.config.read_bytes() + made.encode() + self.design.fingerprint.encode()).hexdigest()


def read_options(args: list[str]) -> Options:
    """Read what follows `compare`; a `ConfigurationError` says what is wrong with it."""
    own, flags = behind(args)
    parser = _parser()
    ours, words = _split_methods(own, set(parser._option_string_actions) | {"--method"})
    options = parser.read(ours, Options(words=words, flags=flags))
    options.name = options.name or options.config.stem
    check_name(options.name)
    if options.jobs < 1:
        raise ConfigurationError(f"Expected `--jobs` to be a whole number >= 1, got {options.jobs}.")
    if options.effect is not None and not options.effect > 0:
        raise ConfigurationError(f"Expected `--effect` to be a number above 0, got {options.effect:g}.")
    for key, _ in [*pairs(options.flags), *(pair for one in words.values() for pair in pairs(one))]:
        check_key(key, "comparison", "behind `--method` or `--`")
        if key == SEED:
            raise ConfigurationError(f"Expected `{key}` to be left to the comparison, got it: see --seeds.")
    options.storage = options.storage or f"sqlite:///{options.folder / options.name}.db"
    options.design = _design(options)
    return options


def _parser() -> Parser:
    parser = Parser(
        "compare",
        "--config FILE --method NAME [flags] --method NAME [flags] ... --tune KEY LOW HIGH "
        "[log] ... [options] [-- further flags of cli.py fit]",
        description="Does it help here? Compare methods at equal effort: the same trials for each, seeds that no "
        "tuning saw, paired differences. --method NAME [flags]: what is compared; repeat.",
        epilog=_EXAMPLE,
        config="config of all runs",
    )
    add = parser.add_argument
    add("--tune", nargs="*", action="append", default=[], type=str.strip, metavar="KEY LOW HIGH [log]",
        help="a key and its range, or KEY V1,V2,...; repeat")  # fmt: skip
    add("--trials", type=int, default=16, metavar="N", help="settings tried of each method (default: 16)")
    add("--seeds", type=int, default=5, metavar="N", help="seeds with which the best ones are run (default: 5)")
    add("--tuning-seeds", type=int, default=1, metavar="N", help="seeds of each trial (default: 1)")
    add("--metric", default="val/accuracy", metavar="TAG", help="what trials are chosen by (default: val/accuracy)")
    add("--report", default="", metavar="TAG", help="what is compared, e.g. test/accuracy (default: as --metric)")
    add("--mode", metavar="max|min", help="whether more of --metric is better (default: max for an accuracy, else min)")
    add("--budget", default="steps", metavar="|".join(BUDGETS), help="what all have as much of (default: steps)")
    add("--controls", action="store_true", help="for each method with IRE also gamma = 1 and a random mask")
    add("--on-top", action="store_true", help="keep the base's tuned settings, and tune a method's own keys")
    add("--halving", action="store_true", help="stop trials at a quarter; the best quarter of them goes to the end")
    add("--versus", nargs=2, action="append", default=[], metavar=("A", "B"), help="compare A with B too; repeat")
    add("--effect", type=float, metavar="X", help="how many seeds would be needed to see a difference of X?")
    add("--curve", default="val/loss", metavar="TAG", help="value that is drawn against passes (default: val/loss)")
    add("--jobs", type=int, default=1, metavar="N", help="runs at the same time on this machine (default: 1)")
    add("--name", help="name of the study (default: that of the config)")
    add("--folder", type=Path, default=Path("compare"), help="where logs and reports go (default: compare)")
    add("--storage", metavar="URL", help="database of the study (default: the SQLite file FOLDER/NAME.db)")
    add("--report-only", action="store_true", help="write the report of what there is and run nothing")
    return parser


def _split_methods(args: list[str], known: set[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Take the methods with their flags out of a command line."""
    ours: list[str] = []
    methods: dict[str, list[str]] = {}
    into = ours
    words = iter(args)
    for word in words:
        name, equals, value = word.partition("=")
        if name == "--method":
            title = value if equals else next(words, "")
            if not title or title.startswith("--"):
                raise ConfigurationError(f"Expected a name after `--method`, got {title or 'nothing'!r}.")
            if title in methods:
                raise ConfigurationError(f"Expected methods to have different names, got {title!r} twice.")
            into = methods.setdefault(title, [])
            continue
        if name in known:
            into = ours
        into.append(word)
    for title, flags in methods.items():
        if flags and not flags[0].startswith("-"):
            raise ConfigurationError(f"Expected flags behind `--method {title}`, got {flags[0]!r}.")
    return ours, methods


def _design(options: Options) -> Design:
    """The methods with what is tuned of each, and the controls."""
    config = content(options.config)
    if not isinstance(config, dict):
        raise ConfigurationError(f"Expected `--config` to be a config in YAML, got {options.config}.")
    check_choice("--budget", options.budget, BUDGETS)
    given = dict(_flat(config.get("ire"), "ire"))
    given |= dict(pairs(options.flags))
    settings = {name: dict(pairs(words)) for name, words in options.words.items()}
    shared: dict[str, Range | Choice] = {}
    own: dict[str, dict[str, Range | Choice]] = {name: {} for name in settings}
    tuned = [word[0] for word in options.tune if word]
    for key, how, names in (_tuned(words, list(settings)) for words in options.tune):
        check_key(key, "comparison", "behind --tune")
        if key == SEED:
            raise ConfigurationError(f"Expected `{key}` to be left to the comparison, got it behind --tune.")
        if key in dict(pairs(options.flags)):
            raise ConfigurationError(f"Expected `{key}` to be set in one place, got it behind --tune and `--`.")
        if key in shared or any(key in own[name] for name in names or own):
            raise ConfigurationError(f"Expected `--tune {key}` to be given once, got it twice.")
        used = names or [name for name in settings if _has_use(key, {**given, **settings[name]}, tuned)]
        if not used:
            raise ConfigurationError(f"Expected a method with a use for `--tune {key}`, got none: no method has it on.")
        if names or key.startswith("ire."):
            for name in used:
                own[name][key] = how
        else:
            shared[key] = how
    methods = [Method(name, settings[name], own[name]) for name in settings]
    if vars(options)["controls"]:
        boosted = [one for one in methods if _boosts({**given, **settings[one.name]}, tuned)]
        if not boosted:
            raise ConfigurationError("Expected a method with `ire.kappa` above 0 for `--controls`, got none.")
        for label, flag in (("gamma = 1", ("ire.gamma", "1")), ("random mask", ("ire.curvature", "RandomMask"))):
            for one in boosted:
                name, (key, value) = f"{one.name}, {label}", flag
                options.words[name] = [*options.words[one.name], f"--{key}", value]
                methods.append(Method(name, {**one.settings, key: value}, one.tune, control_of=one.name))
    metric, report = vars(options)["metric"], vars(options)["report"]
    if metric.startswith("test/"):
        raise ConfigurationError(
            f"Expected `--metric` to be a validation metric, got {metric}: settings would be chosen by the test data. "
            f"Write --report {metric}."
        )
    lengths = [key for key in ("trainer.max_steps", "trainer.max_epochs") for one in settings.values() if key in one]
    if lengths:
        raise ConfigurationError(f"Expected `{lengths[0]}` to be the same for all methods, got it behind --method.")
    if options.budget != "steps":
        for one in methods:
            effective = {**given, **one.settings}
            late = [key for key in effective if re.fullmatch(r"ire\.(perturbation\.)?(start|stop)_epoch", key)]
            late = [key for key in late if effective[key] not in (None, "null") and _active(key, effective, tuned)]
            if late:
                raise ConfigurationError(
                    f"Expected `{late[0].replace('_epoch', '_step')}`, a fraction of the run, with --budget "
                    f"{options.budget}, got `{late[0]}` for {one.name}: its runs have another number of epochs."
                )
    return Design(
        methods, shared, options.trials, options.seeds, options.tuning_seeds, metric, report,
        options.mode or _mode(metric), options.budget, options.on_top, options.halving,
        [tuple(pair) for pair in options.versus], _mode(report) if report not in ("", metric) else "",
    )  # fmt: skip


def _mode(tag: str) -> str:
    """Whether more or less of a logged value is better, by its name."""
    return "max" if "accuracy" in tag else "min"


def _tuned(words: list[str], methods: list[str]) -> tuple[str, Range | Choice, list[str]]:
    """Read what follows one `--tune`: the key, its values, and the names of methods."""
    if len(words) < 2:
        raise ConfigurationError(f"Expected a key and its range behind `--tune`, got {' '.join(words) or 'nothing'!r}.")
    key, first, *rest = words
    how: Range | Choice
    if "," in first:
        how = Choice(tuple(value for value in first.split(",") if value))
    else:
        low, high = number(first), number(rest[0]) if rest else None
        if low is None or high is None:
            raise ConfigurationError(
                f"Expected `--tune {key}` to have two numbers, or values with commas, got {' '.join(words[1:])!r}."
            )
        rest = rest[1:]
        try:
            how = Range(low, high, log=rest[:1] == ["log"])
        except ConfigurationError as error:
            raise ConfigurationError(f"{str(error).removesuffix('.')} behind `--tune {key}`.") from None
        rest = rest[how.log :]
    if unknown := [word for word in rest if word not in methods]:
        raise ConfigurationError(
            f"Expected names of methods ({', '.join(methods)}) behind `--tune {key}` and its range, got {unknown[0]!r}."
        )
    return key, how, rest


def _has_use(key: str, settings: Mapping[str, Any], tuned: list[str]) -> bool:
    """Whether a method with these settings has a use for a key."""
    return not key.startswith("ire.") or _active(key, settings, tuned)


def _active(key: str, settings: Mapping[str, Any], tuned: list[str]) -> bool:
    """Whether what a key of `ire` is about is on."""
    if key.startswith("ire.perturbation."):
        named = settings.get("ire.perturbation", settings.get("ire.perturbation.class_path"))
        return "ire.preset" in settings or named not in (None, "null")
    return _boosts(settings, tuned)


def _boosts(settings: Mapping[str, Any], tuned: list[str]) -> bool:
    """Whether kappa is above 0, as far as the command line and the config say it."""
    if "ire.kappa" in settings:
        return number(str(settings["ire.kappa"])) != 0
    return "ire.preset" in settings or "ire.kappa" in tuned or any(key.startswith("ire.kappa.") for key in settings)


def _flat(value: Any, key: str) -> Any:
    """Yield the values of nested dictionaries with their dotted keys, those of a class without `init_args`."""
    if not isinstance(value, dict):
        yield key, value
        return
    for name, item in value.items():
        yield from _flat(item, key if name == "init_args" else f"{key}.{name}")
