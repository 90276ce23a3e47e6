"""Command lines: every key of the composed configuration with values that nobody should give, and sweeps of them."""

from __future__ import annotations

import functools
import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path

from dppo import config, dotted
from tests.conftest import small
from tests.fuzz.cases import Case, others_run
from tests.fuzz.world import copy_cache, copy_model, put_inputs

VALUES = [
    "", "null", "nan", "inf", "-inf", "1e400", "-1e400", "-1", "-0.0", "0", "1", "2", "3", "0.5", "1.5", "1e-320",
    "1e308", "1000000000000000000", "9223372036854775808", "-9223372036854775809", "1" * 400, "1" * 5000, "1_000",
    "0x10", "1e5", "1e-5", "true", "false", "yes", "[]", "{}", "[1,2]", "[null]", "[[[[[[]]]]]]", "{a:1}",
    "{a:{b:{c:[1]}}}", "{_target_:os.system}", "{'':1}", "'x y'", '"q"', "'", '"', "\\", "a\\,b", "a,b", "a,a", ",",
    "range(0,5)", "range(5,0)", "range(0,1000000000)", "range(0,1,0)", "range(0,1,1e-12)", "choice(1,2)", "choice()",
    "interval(0,1)", "glob(*)", "glob(../*)", "sort(3,1)", "shuffle(1,2)", "int(1.5)", "int(x)", "float(1)", "str(1)",
    "bool(maybe)", "json_str({a:1})", "extend_list(1)", "tag(a,b,1)", "tag(log,interval(0,1))", "cast(1)", "nope(1)",
    "${seed}", "${.}", "${..}", "${...}", "${nope}", "${oc.env:DPPO_NO_SUCH}", "${oc.env:HOME}", "${oc.env:DPPO_NO_SUCH,1}",
    "${oc.decode:'['}", "${oc.decode:1}", "${oc.create:{a:1}}", "${alpha}", "${beta}", "${train}", "${loss.beta}",
    "${hydra:job.num}", "${hydra.run.dir}", "${oc.select:nope}", "${oc.select:nope,1}", "${oc.dict.keys:train}",
    "${now:%Y}", "${now:%Q%%}", "${nope:1}", "${", "${{", "}", "{", "[", "]", "(", ")", "\\${x}", "$", "%s", "%n%x",
    "???", "_self_", "@", "a=b", "==", "- a", "\0", "a\0b", "\n", "a\nb", "\r", "\t", " ", "  1  ", "é", "💥",
    "\udcff", "\u202eabc", "\x1b[31mred", "\x07", "\u2028", "x" * 300, "x" * 5000, "é" * 200, "/", "//", "~", ".", "..",
    "../..", "../../x", "/proc/self/mem", "/dev/null", "/dev/zero", "/dev/stdin", "/etc/shadow", "/root", "/proc/1/x",
    "os.system", "builtins.eval", "dppo.config.Experiment", "dppo.errors.UserError", "dppo.pipeline.run", "dppo.",
    "dppo..config", ".dppo", "dppo.losses.pairwise.DPO", "dppo.__main__.os.system", "a.b", "a/b", "a/../b", "CON", "NUL",
    "p95", "p0", "p101", "test", "train", "validation", "cpu", "cuda", "cuda:99", "auto", "none", "None", "model",
    "pairs.jsonl", "ranked.jsonl", "chats.jsonl", "http://", "http://127.0.0.1:9", "file:///etc/passwd", "sqlite://",
]  # fmt: skip
WHOLE = [
    "", "=", "==", "=1", "+", "~", "++", "+=1", "~=1", "alpha", "~alpha", "+alpha", "a b=1", "alpha =1", " alpha=1",
    "-x", "--nope", "--cfg", "--cfg=job", "--cfg=nope", "--cfg=hydra", "--info", "--info=nope", "--info=config",
    "--resolve", "--package=x", "--package=train", "--run", "--config-name=nope", "--config-name=../conf/config",
    "--config-path=/nowhere", "--config-dir=/nowhere", "--config-dir=.", "--experimental-rerun=x.pickle",
    "--experimental-rerun", "--shell-completion", "-sc=query=bash", "--hydra-help", "--version", "-m", "-mm", "--multirun",
    "--multirun=1", "é=1", "💥=1", "\0=1", "\n", "a\nb=1", "alpha\n=1", "@=1", "train@=1", "train@x=default", "train@=lora",
    "loss@:x=dpo", "+loss@phases.x.loss=dpo", "+loss@a.b.c=dpo", "loss/base/x=1", "/loss=dpo", "//loss=dpo", "loss/=dpo",
    "../loss=dpo", "loss=../penalty/linear", "loss=..", "loss=.", "loss=/etc/passwd", "loss=", "loss=null", "~loss",
    "~train", "~model", "~dataset", "~hydra", "~cache", "~tracking", "~evaluation", "~sft", "~reward", "~loss=unll",
    "~loss=dpo", "loss=[dpo,unll]", "loss=[]", "loss=dpo/", "loss=dpo.yaml", "loss={a:1}", "loss=DPO", "loss='dpo'",
    "experiment=nope", "+experiment=nope", "experiment=[nope]", "+experiment=[unll_then_dpo,iterated_dpo]",
    "+experiment=../config", "+sweep=nope", "+sweep=alpha", "hydra/sweeper=optuna", "hydra/sweeper=nope",
    "hydra/launcher=nope", "hydra/job_logging=nope", "hydra/job_logging=none", "hydra/help=nope", "hydra/output=default",
    "hydra=nope", "hydra=null", "hydra={}", "phases={}", "phases=[]", "phases=null", "phases={a:{}}", "phases={a:null}",
    "+phases.a.loss=dpo", "phases={'':{loss:${loss},train:${train},reference:sft}}", "phases={../x:{loss:${loss},train:${train},reference:sft}}",
    "phases={a:{loss:${loss},train:${train},reference:previous}}", "phases={a:{loss:${loss},train:${train},reference:sft,x:1}}",
    "allowed_targets=[os]", "allowed_targets=os", "allowed_targets=['']", "allowed_targets=[builtins]",
    "objectives=[]", "objectives=win_rate.value", "objectives=[win_rate]", "objectives=[win_rate.value,win_rate.value]",
    "objectives=['']", "objectives=[.]", "objectives=[1]", "init_from=.", "init_from=pairs.jsonl", "init_from=model",
    "penalty=linear penalty_fn=linear", "penalty_fn=nope", "+penalty=linear", "++penalty=linear", "penalty=null",
    "alpha={a:${alpha}}", "alpha=${alpha}", "seed=${train.steps}", "train.steps=${seed}", "train=${train}", "train=${..}",
    "hydra.searchpath=[file:///nowhere]", "hydra.searchpath=[pkg://os]", "hydra.searchpath=[nope]", "hydra.searchpath=x",
    "hydra.searchpath=[]", "hydra.searchpath=null", "hydra.callbacks.x._target_=os.system",
    "+hydra.callbacks.x._target_=os.system", "+hydra.callbacks.x={_target_:os.getcwd}", "hydra.callbacks=null",
    "+hydra.callbacks.x._target_=hydra.experimental.callbacks.PickleJobInfoCallback",
    "hydra.launcher._target_=os.system", "hydra.sweeper._target_=os.system", "hydra.job.chdir=true", "hydra.job.chdir=x",
    "hydra.output_subdir=null", "hydra.output_subdir=a/b", "hydra.output_subdir=",
    "hydra.run.dir=", "hydra.run.dir=..", "hydra.run.dir=outputs/a/../b", "hydra.run.dir=pairs.jsonl",
    "hydra.run.dir=" + "x" * 300, "hydra.run.dir='outputs/é 💥'", "hydra.run.dir=outputs/${seed}", "hydra.run.dir=null",
    "hydra.run.dir=outputs/${oc.env:DPPO_NO_SUCH}", "hydra.run.dir=/proc/x", "hydra.sweep.dir=/proc/x", "hydra.verbose=true",
    "hydra.verbose=nope", "hydra.verbose=[nope]", "+hydra.job.env_set.OMP_NUM_THREADS=x", "+hydra.job.env_set.A=1",
    "hydra.job.name=", "hydra.job.name=../x", "hydra.mode=MULTIRUN", "hydra.mode=RUN", "hydra.mode=x", "hydra.job.num=x",
    "hydra.job_logging=null", "hydra.job_logging.version=2", "hydra.job_logging.handlers.file.filename=/proc/x",
    "hydra.job_logging.handlers.file.filename=../x", "hydra.job_logging.handlers.file={'()':os.getcwd}",
    "hydra.job_logging.formatters.simple.format=%(nope)s", "hydra.job_logging.root.level=NOPE", "hydra.runtime.cwd=x",
    "hydra.job.config.override_dirname.kv_sep=x", "hydra.overrides.task=[]", "hydra.help.template=${nope}",
    "cache.dir=", "cache.dir=.", "cache.dir=..", "cache.dir=pairs.jsonl", "cache.dir=pairs.jsonl/x", "cache.dir=/proc/x",
    "cache.dir=" + "x" * 300, "cache.dir=null", "cache.dir='a\0b'", "cache.dir=/dev/null", "cache.dir=outputs/\udcff",
]  # fmt: skip

if os.getuid() == 0 and not others_run():  # words that root would obey
    VALUES = [value for value in VALUES if not value.startswith(("/", "~"))]
    WHOLE = [word for word in WHOLE if "=/" not in word]

_BASES: list[list[str]] = [
    [],
    *([f"loss={name}"] for name in ("dpo", "ipo", "simpo", "kto", "rrhf", "orpo", "minll", "conll", "npo", "none", "sft")),
    ["penalty=expectile"],
    ["loss=unll", "loss/base=simpo"],
    ["dataset=pairs_file", "dataset.path=pairs.jsonl", "reward=length"],
    ["dataset=ranked_file", "dataset.path=ranked.jsonl", "loss=rrhf", "reward=length"],
    ["dataset=labelled_file", "dataset.path=labelled.jsonl", "loss=kto", "reward=length"],
    ["dataset=trl_preference", "dataset.path=pairs.jsonl", "reward=length"],
    ["dataset=on_policy", "loss=dpo"],
    ["dataset=arithmetic", "loss=dpo_positive"],
    ["+experiment=unll_then_dpo"],
    ["+experiment=iterated_dpo"],
    ["model=pretrained", "model.name_or_path=model"],
    ["model=smollm2_135m"],
    ["reward=bradley_terry", "loss=dpo"],
    ["reward=endpoint", "reward.server.base_url=http://127.0.0.1:9/v1", "reward.model=x"],
    ["reward=judge", "reward.server.base_url=http://127.0.0.1:9/v1", "reward.model=x"],
    ["reward=classifier", "reward.name_or_path=model"],
    ["reward=sentiment"],
    ["evaluation=sampled"],
    ["evaluation.interim.n_points=4", "evaluation.interim.kl=true"],
    ["generation=vllm"],
    ["train=lora", "loss=dpo"],
    ["sft=none"],
    ["tracking=jsonl"],
    ["tracking=wandb"],
]  # fmt: skip
_OPTIONS = sorted(
    f"{path.parent.relative_to(config.CONF_DIR).as_posix()}={path.stem}"
    for path in config.CONF_DIR.glob("*/**/*.yaml")
    if path.parent.name != "experiment" and path.relative_to(config.CONF_DIR).parts[0] != "hydra"
)


def override_case(world: Path, number: int, seed: int) -> Case:
    """One to three mutated words on top of a valid small run; mostly planned, sometimes run."""
    rng = random.Random(f"overrides {seed} {number}")
    base = rng.choice(_BASES)
    real = rng.random() < 0.12 and not any("endpoint" in word or "judge" in word or "wandb" in word for word in base)
    words = [*small(*base, "device=cpu"), *([] if real else ["dry_run=true"])]
    mutated = [mutation(rng, tuple(base)) for _ in range(rng.choice((1, 1, 1, 2, 3)))]
    for word in mutated:
        if rng.random() < 0.2:
            words = [one for one in words if config.key_of(one) != config.key_of(word)]
        words.insert(rng.randint(0, len(words)) if rng.random() < 0.3 else len(words), word)
    if real and any(_huge(word) for word in mutated):
        words.append("dry_run=true")
    command = "dppo.inspect" if rng.random() < 0.05 else "dppo"

    def prepare(here: Path) -> None:
        put_inputs(here)
        if any("model" in word for word in base):
            copy_model(world, here)
        if real:
            copy_cache(world, here)

    note = " | ".join(map(repr, mutated))
    return Case("overrides", number, command, tuple(words), prepare, note=note[:500])


def sweep_case(world: Path, number: int, seed: int) -> Case:
    """Multiruns and searches, mostly planned, over ranges and with settings that make little sense."""
    rng = random.Random(f"sweeps {seed} {number}")
    if rng.random() < 0.35:
        mutated = [_swept(rng, _MULTIRUN) for _ in range(rng.randint(1, 3))]
        words = ["-m", *mutated]
    else:
        spaces = [_swept(rng, _SPACES) for _ in range(rng.randint(1, 2))]
        settings = [_swept(rng, _SEARCH) for _ in range(rng.randint(0, 2))]
        first = rng.choice(
            (["+sweep=alpha"], ["+sweep=alpha_zeta"], ["hydra/sweeper=optuna"], ["hydra/sweeper=optuna"])
        )
        words = ["-m", *first, "hydra.sweeper.n_trials=2", *spaces, *settings]
        mutated = [*spaces, *settings]
    if rng.random() < 0.3:
        mutated.append(mutation(rng, ()))
        words.append(mutated[-1])
    rest = [word for word in small("device=cpu") if config.key_of(word) not in {config.key_of(one) for one in words}]
    words += rest
    real = rng.random() < 0.1 and not any(_huge(word) for word in mutated)
    words += [] if real else ["dry_run=true"]

    def prepare(here: Path) -> None:
        put_inputs(here)
        if real:
            copy_cache(world, here)

    return Case("sweeps", number, "dppo", tuple(words), prepare, note=" | ".join(map(repr, mutated))[:500])


def _huge(word: str) -> bool:
    """Whether a run would do what it was told to for a very long time."""
    return any(part in word for part in ("000000", "11111", "9223372", "1e308", "1e5", "1_000", "0x10", "range"))


def mutation(rng: random.Random, base: tuple[str, ...]) -> str:
    draw = rng.random()
    if draw < 0.3:
        return rng.choice(WHOLE)
    if draw < 0.36:
        group = rng.choice(_OPTIONS).partition("=")[0]
        return f"{group}={rng.choice((*VALUES, *(one.partition('=')[2] for one in _OPTIONS)))}"
    if draw < 0.4:
        return rng.choice(_OPTIONS)
    keys = keys_of(base, with_hydra=draw > 0.9)
    key, value = rng.choice(keys), rng.choice(VALUES)
    change = rng.random()
    if change < 0.1:
        key = _typo(rng, key)
    elif change < 0.15:
        key = rng.choice((f"{key}.x", f"{key}[0]", f"{key}.0", f"{key}@x", f"{key}.", f".{key}", f"{key}._target_",
                          key.rpartition(".")[0] or key, key.upper(), key.replace(".", "/")))  # fmt: skip
    prefix = rng.choice(("", "", "", "", "+", "++", "~", "+++", "-")) if rng.random() < 0.4 else ""
    return f"{prefix}{key}" if prefix == "~" and rng.random() < 0.7 else f"{prefix}{key}={value}"


def _typo(rng: random.Random, key: str) -> str:
    place = rng.randrange(len(key))
    return rng.choice((
        key[:place] + key[place + 1 :],
        key[:place] + key[place] + key[place:],
        key[:place] + rng.choice("aeiou._/@:é \0") + key[place:],
    ))  # fmt: skip


@functools.cache
def keys_of(base: tuple[str, ...], with_hydra: bool) -> list[str]:
    """Every key that there is with the options in ``base``, with ``with_hydra`` Hydra's own."""
    from omegaconf import OmegaConf

    composed = config.compose(list(base), with_hydra=True)
    plain = OmegaConf.to_container(composed.hydra if with_hydra else config.compose(list(base)), resolve=False)
    assert isinstance(plain, dict)
    prefix = "hydra." if with_hydra else ""
    return [prefix + name for name in dotted.names({str(key): value for key, value in plain.items()})]


Maker = Callable[[random.Random], str]
_MULTIRUN: Sequence[str | Maker] = (
    "seed=0,1", "seed=0,0", "loss=dpo,dpo", "loss=dpo,nope", "loss=dpo,none", "seed=range(0,3)", "seed=range(3,0)",
    "seed=range(0,1000000000)", "seed=range(0,3,0)", "alpha=range(0,1,0.3)", "alpha=0.1,-1", "alpha=nan,1", "alpha=inf,1",
    "alpha=choice()", "alpha=glob(*)", "loss=glob(*)", "loss=glob(nope*)", "loss=glob(../*)", "penalty=glob(*)",
    "seed=interval(0,1)", "seed=sort(1,0)", "seed=shuffle(0,1)", "seed=,", "seed=1,", "seed=',',2", "seed='a,b','c'",
    "hydra.sweep.dir=.", "hydra.sweep.dir=..", "hydra.sweep.dir=", "hydra.sweep.subdir=x",
    "hydra.sweep.subdir=", "hydra.sweep.subdir=${seed}", "hydra.sweep.subdir=${hydra.job.override_dirname}",
    "hydra.sweep.dir=" + "x" * 300, "hydra.sweep.subdir=" + "x" * 300, "hydra.sweeper.max_batch_size=0",
    "hydra.sweeper.max_batch_size=-1", "hydra.sweeper.max_batch_size=1", "hydra.sweeper.params={seed:'0,1'}",
    "hydra.sweeper.params={seed:null}", "hydra.sweeper.params=x", "hydra.sweeper.params=[1]", "+sweep=alpha_grid",
    "+sweep=nope", "+sweep=[alpha_grid,dpo_grid]", "train.steps=1,2", "train.steps=8,x", "dataset=instructions,pairs_file",
    "report=maybe,true", "report=true,false", "dry_run=true,false", "hydra.run.dir=a,b", "cache.dir=outputs/a,outputs/b",
    lambda rng: f"{rng.choice(keys_of((), False))}={rng.choice(VALUES)},{rng.choice(VALUES)}",
    lambda rng: f"{rng.choice(keys_of((), False))}={rng.choice(VALUES)},{rng.choice(VALUES)}",
    lambda rng: f"{rng.choice(keys_of((), False))}={rng.choice(VALUES)},{rng.choice(VALUES)}",
)  # fmt: skip
_SPACES: Sequence[str | Maker] = (
    "alpha=interval(0,1)", "alpha=interval(1,0)", "alpha=interval(0,0)", "alpha=interval(nan,1)", "alpha=interval(0,inf)",
    "alpha=interval(-1,1)", "alpha=interval(a,b)", "alpha=interval(0,1,2)", "alpha=interval()", "alpha=calibrated",
    "alpha=tag(log,interval(0,1))", "alpha=tag(log,interval(-1,1))", "alpha=tag(log,interval(1e-4,1))",
    "alpha=tag(nope,interval(0,1))", "alpha=tag(log,choice(1,2))", "alpha=int(interval(0.5,0.6))", "alpha=choice(1)",
    "alpha=choice(1,1)", "alpha=choice()", "alpha=choice(1,a,null,[1])", "alpha=range(1,3)", "alpha=range(3,1)",
    "alpha=range(0,1,0)", "alpha=range(0,1e18)", "alpha=range(0.1,0.9,0.1)", "loss=choice(dpo,unll)", "loss=choice(dpo,nope)",
    "loss=dpo,unll", "penalty=choice(linear,sqrt)", "train.steps=int(interval(1,8))", "train.steps=interval(1,8)",
    "train.steps=range(1,9,2)", "train.batch_size=choice(4,8)", "train.batch_size=choice(0,4)", "zeta=interval(0,2)",
    "zeta=interval(0.1,0.9)", "seed=range(0,3)", "cache.dir=choice(a,b)", "hydra.run.dir=choice(a,b)", "nope=interval(0,1)",
    "alpha.x=interval(0,1)", "+nope=choice(1,2)", "train.learning_rate=tag(log,interval(1e-5,1e-3))",
    "train.learning_rate=interval(1e-400,1)", "alpha=interval(1e-320,1e308)", "alpha=tag(log,tag(log,interval(1,2)))",
    "alpha=shuffle(interval(0,1))", "alpha=sort(1,2)", "alpha=glob(*)",
    lambda rng: f"{rng.choice(keys_of((), False))}=interval({rng.choice(VALUES)},{rng.choice(VALUES)})",
    lambda rng: f"{rng.choice(keys_of((), False))}=choice({rng.choice(VALUES)},{rng.choice(VALUES)})",
)  # fmt: skip
_STORAGES = ("sqlite://", "sqlite:///", "sqlite:///x.db", "sqlite:////nowhere/x.db", "sqlite:///pairs.jsonl", "journal:///",
             "journal:///x.log", "journal:///pairs.jsonl", "journal:///nowhere/x", "postgresql://", "postgresql://u:p@",
             "postgresql://u:p@127.0.0.1:9/x", "postgresql://u:p@ss@h/x", "mysql://x", "redis://127.0.0.1:9", "grpc://",
             "grpc://127.0.0.1:x", "x", "", "null", "file:///etc/passwd", "sqlite+pysqlite:///y.db", "[]", "://")  # fmt: skip
_SEARCH: Sequence[str | Maker] = (
    *(f"hydra.sweeper.n_trials={value}" for value in ("0", "-1", "1", "null", "1e9", "x", "1000000000000", "1.5", "true")),
    *(f"hydra.sweeper.n_jobs={value}" for value in ("0", "-1", "null", "x", "1.5")),
    *(f"hydra.sweeper.direction={value}" for value in ("minimize", "nope", "[]", "[maximize,minimize]", "null", "1")),
    *(f"'hydra.sweeper.study_name={value}'"[1:-1] for value in ("..", "../x", "a/b", "", "null", "x" * 300, "é", "'a b'",
      "'\0'", ".", "/", "/etc/x", "${seed}", "'a\nb'", "[]", "%00", "'\\'", "1")),
    lambda rng: f"hydra.sweeper.storage='{rng.choice(_STORAGES)}'",
    lambda rng: f"hydra.sweeper.storage='{rng.choice(_STORAGES)}'",
    *(f"hydra/sweeper/sampler={value}" for value in ("tpe", "grid", "random", "qmc", "nsga2", "cmaes", "gp", "nope", "null")),
    *(f"hydra/sweeper/pruner={value}" for value in ("median", "halving", "hyperband", "none", "wilcoxon", "nope", "null")),
    *(f"hydra.sweeper.replicates={value}" for value in ("0", "-1", "2", "x", "null", "100000")),
    *(f"hydra.sweeper.value={value}" for value in ("mean", "lower_bound", "nope", "null")),
    *(f"hydra.sweeper.baselines={value}" for value in ("x", "['loss=nope']", "['']", "[null]", "[[1]]", "['loss=dpo','loss=dpo']",
      "['alpha=interval(0,1)']", "['loss=dpo,unll']", "['-m']", "['loss=\"']", "['loss=dpo hydra.run.dir=..']")),
    *(f"hydra.sweeper.enqueue={value}" for value in ("x", "['alpha=0.5']", "['alpha=99']", "['nope=1']", "['']", "[1]", "['alpha']")),
    *(f"hydra.sweeper.constraints={value}" for value in ("x", "['kl<=1']", "['kl.nats_per_token<=0.5']", "['x']", "['a<=b']",
      "['win_rate.value<=nan']", "['__import__(\"os\")<=1']", "[1]", "['']")),
    *(f"hydra.sweeper.when={value}" for value in ("x", "{zeta:{penalty:[expectile]}}", "{alpha:{loss:[unll]}}", "{alpha:{alpha:[1]}}",
      "{nope:{loss:[unll]}}", "{alpha:x}", "{alpha:{}}", "[]", "{alpha:{nope:[1]}}")),
    *(f"hydra.sweeper.labels={value}" for value in ("x", "{alpha:scientific}", "{alpha:nope}", "{nope:fixed}", "[]", "{alpha:null}")),
    *(f"hydra.sweeper.params={value}" for value in ("x", "{alpha:'interval(0,1)'}", "{alpha:1}", "{alpha:null}", "{alpha:[1]}", "[]",
      "{alpha:'interval(1'}", "{'':'choice(1,2)'}", "{alpha:{a:1}}")),
    *(f"hydra.sweeper.custom_search_space={value}" for value in ("os.system", "x", "dppo.config.load", "builtins.print", "[]", "..")),
    *(f"hydra.sweeper.test_seeds={value}" for value in ("-1", "x", "1", "null")),
    *(f"hydra.sweeper.max_failure_rate={value}" for value in ("-1", "2", "nan", "0", "x")),
    *(f"hydra.sweeper.resume={value}" for value in ("true", "x", "null")),
    "hydra.sweeper.nope=1", "~hydra.sweeper.n_trials", "objectives=[win_rate.value,kl.nats_per_token]", "hydra.sweep.dir=..",
    "hydra.sweep.dir=.", "hydra.sweep.dir=", "hydra.sweep.dir=pairs.jsonl", "hydra.sweeper.sampler.seed=x",
    "hydra.sweeper.sampler.seed=-1", "hydra.sweeper.sampler.n_startup_trials=-1", "hydra.sweeper.pruner.n_startup_trials=-1",
    "hydra.sweeper.sampler._target_=os.system", "hydra.sweeper.pruner._target_=os.system", "hydra.sweeper.sampler=null",
)  # fmt: skip


def _swept(rng: random.Random, pool: Sequence[str | Maker]) -> str:
    found = rng.choice(pool)
    return found if isinstance(found, str) else found(rng)
