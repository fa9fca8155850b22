"""Configs: where values come from, what a mistake is answered with, and what an identity is."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from latentwire.config import CheckpointSection, Config, load_config, parse_config
from latentwire.errors import ConfigError, LatentWireError, WorkloadError
from latentwire.fleet import load_fleet
from latentwire.sbatch import EXTRA
from latentwire.target import load_target, options_model
from latentwire.tree import differences

REPOSITORY = Path(__file__).parents[2]
TARGET = "json:JSONDecoder"
"""Any module without ``Options`` will do."""
PLAIN = {"name": "plain", "workload": {"target": TARGET}}

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(text: str | dict[str, Any], name: str = "config.yaml") -> Path:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text if isinstance(text, str) else yaml.safe_dump(text))
        return path

    return write


def parse(**sections: Any) -> Config:
    return parse_config(PLAIN | sections, "here")


# ---- Where values come from ------------------------------------------------------------------------------------------


def test_later_wins_defaults_base_file_override(write: Write) -> None:
    write({**PLAIN, "seed": 1, "train": {"steps": 500, "micro_batch": 2}, "retry": {"oom": 1}}, "ground.yaml")
    write({"base": "ground.yaml", "seed": 2, "train": {"steps": 600}}, "base.yaml")
    path = write({"base": "base.yaml", "seed": 3})
    config = load_config(path, ["train.optimizer.lr=0.5", "seed=4"])
    assert (config.seed, config.train.steps, config.train.micro_batch) == (4, 600, 2)
    assert (config.train.optimizer.lr, config.train.optimizer.eps) == (0.5, 1e-8)
    assert (config.retry.oom, config.retry.network) == (1, 5)


def test_a_base_is_found_beside_its_file(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    write(PLAIN, "shared/base.yaml")
    path = write({"base": "../shared/base.yaml", "name": "mine"}, "mine/config.yaml")
    monkeypatch.chdir("/")
    assert load_config(path).name == "mine"


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("train.steps=200", "train", "steps", 200),
        ("train.grad_clip=null", "train", "grad_clip", None),
        ("train.grad_clip=1e-3", "train", "grad_clip", 1e-3),
        ("train.deterministic=false", "train", "deterministic", False),
        ("checkpoint.best_metric=a=b", "checkpoint", "best_metric", "a=b"),
        ("scheduler.extra={mail_type: FAIL}", "scheduler", "extra", {"mail_type": "FAIL"}),
        ("scheduler.partition=", "scheduler", "partition", None),
    ],
)
def test_overrides_are_yaml(write: Write, override: str, section: str, key: str, value: Any) -> None:
    assert getattr(getattr(load_config(write(PLAIN), [override]), section), key) == value


def test_an_override_reaches_into_options_that_are_not_there_yet(write: Write) -> None:
    config = load_config(write(PLAIN), ["workload.options.wire.width=3"])
    assert config.workload.options == {"wire": {"width": 3}}


def test_a_config_cannot_be_changed_later() -> None:
    with pytest.raises(ValueError, match="frozen"):
        parse().train.steps = 3  # type: ignore[misc]


# ---- Mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "answer"),
    [
        ("train.stepz=5", r"train\.stepz: unknown key; did you mean train\.steps"),
        ("trian.steps=5", r"trian: unknown key; did you mean train"),
        ("lr=5", r"lr: unknown key; did you mean train\.optimizer\.lr"),
        ("keep=5", r"keep: unknown key; did you mean .*checkpoint\.keep"),
        ("train.optimizer.momentum=1", r"train\.optimizer\.momentum: unknown key; did you mean train\.optimizer\."),
        ("qwertz=1", r"qwertz: unknown key; valid here: name, seed"),
    ],
)
def test_an_unknown_key_names_its_neighbours(write: Write, override: str, answer: str) -> None:
    path = write(PLAIN)
    with pytest.raises(ConfigError, match=answer) as caught:
        load_config(path, [override])
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("override", "answer"),
    [
        ("monitor.trackers=[wandbb]", "there is no tracker 'wandbb'; did you mean wandb"),
        ("monitor.trackers=[paper]", "there is no tracker 'paper'; there are: aim, clearml, .*tensorboard"),
        ("monitor.tracker_options={mlfow: {}}", "did you mean mlflow"),
        ("monitor.tracker_options={comet_ml: {api_key: a}}", "api_key does not belong in a config"),
        ("monitor.tracker_options={wandb: {settings: {apiKey: a}}}", r"settings\.apiKey does not belong in a config"),
        ("checkpoint.mirror_options={access_token: a}", "access_token does not belong in a config"),
        ("checkpoint.mirror_options={more: [{aws_secret_access_key: a}]}", r"more\.aws_secret_access_key does not"),
    ],
)
def test_a_tracker_must_exist_and_brings_no_secrets(write: Write, override: str, answer: str) -> None:
    with pytest.raises(ConfigError, match=answer):
        load_config(write(PLAIN), [override])


def test_what_only_sounds_like_a_secret_is_an_option() -> None:
    options = {"token_file": "t", "max_tokens": 3, "key_prefix": "k", "client_kwargs": {"endpoint_url": "https://x"}}
    assert CheckpointSection(mirror_options=options).mirror_options == options


def test_every_mistake_is_told_at_once(write: Write) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(PLAIN), ["seed=-1", "train.steps=0", "train.sleps=0"])
    assert {line.split(":")[0].strip() for line in str(caught.value).splitlines()[1:]} == {
        "seed", "train.steps", "train.sleps",
    }  # fmt: skip


@pytest.mark.parametrize(
    "override",
    ["seed=-1", "seed=9223372036854775808", "seed=x", "train.steps=0", "train.steps=1.5", "train.micro_batch=-8",
     "train.precision=int8", "train.optimizer.lr=0", "train.optimizer.lr=.inf", "train.optimizer.lr=.nan",
     "train.optimizer.betas=[0.9]", "train.optimizer.betas=[0.9, 1.5]", "train.ema_decay=1", "train.ema_decay=.nan",
     "train.grad_clip=.inf", "train.exploding_grad_norm=.inf", "train.schedule.min_lr_ratio=2",
     "train.schedule.warmup_steps=-1", "train.cpu_threads=0", "data.workers=-1", "checkpoint.keep=0",
     "checkpoint.interval_s=0", "checkpoint.interval_s=.inf", "checkpoint.best_mode=best", "checkpoint.threads=0",
     "preemption.grace_s=-1", "preemption.grace_s=.inf", "preemption.save_signal=KILL", "monitor.interval_s=0",
     "retry.oom=-1", "retry.network_backoff_s=0", "elastic.num_ranks=0", "scheduler.kind=pbs", "scheduler.gpus=-1",
     "scheduler.gpus=[1, 2]", "scheduler.gpus=[2, 2]", "scheduler.gpus=[]", "scheduler.nodes=0",
     "elastic.patience_s=0", "elastic.timeout_s=120", "scheduler.successors=-1", "scheduler.extra={nice: [1]}",
     "train=5", "name=null", "workload=null", "workload.options=7"],
)  # fmt: skip
def test_impossible_values_are_refused_with_the_key(write: Write, override: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(override.partition("=")[0])):
        load_config(write(PLAIN), [override])


@pytest.mark.parametrize(
    ("extra", "answer"),
    [
        ("constrain: h100", "constrain is no option of sbatch; did you mean constraint"),
        ("signal: TERM@9", "signal has a key of its own: preemption.grace_s"),
        ("gres: gpu:2", "gres has a key of its own: scheduler.gpus"),
        ("output: a.txt", "output is set by the submission"),
        ("mail-type: FAIL", "did you mean mail_type"),
        ("xyz: 1", "valid here: acctg_freq, batch"),
    ],
)
def test_an_unknown_option_of_sbatch_is_refused_with_the_valid_ones(write: Write, extra: str, answer: str) -> None:
    with pytest.raises(ConfigError, match=answer):
        load_config(write(PLAIN), [f"scheduler.extra={{{extra}}}"])


def test_gpus_that_cannot_be_divided_among_the_nodes_are_refused(write: Write) -> None:
    with pytest.raises(ConfigError, match="1 GPUs cannot be divided equally among nodes: 2"):
        load_config(write(PLAIN), ["scheduler.gpus=[4, 2, 1]", "scheduler.nodes=2"])


def test_keys_that_do_not_fit_together_are_told_in_a_sentence(write: Write) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(PLAIN), ["train.global_batch=63", "train.micro_batch=16"])
    assert str(caught.value).endswith("  train: global_batch (63) is no multiple of micro_batch (16)")


@pytest.mark.parametrize(
    ("gpus", "nodes", "ladder"),
    [("null", 1, (1,)), ("null", 2, (2,)), ("3", 1, (3,)), ("[4, 2]", 2, (4, 2)), ("0", 1, (0,))],
)
def test_the_ladder(write: Write, gpus: str, nodes: int, ladder: tuple[int, ...]) -> None:
    config = load_config(write(PLAIN), [f"scheduler.gpus={gpus}", f"scheduler.nodes={nodes}"])
    assert config.scheduler.ladder == ladder


def test_a_warm_up_longer_than_the_training_is_refused_with_both_figures() -> None:
    with pytest.raises(ConfigError, match=r"warmup_steps \(100\) must be smaller than steps \(100\)"):
        parse(train={"steps": 100})


@pytest.mark.parametrize(
    "name", ["a/b", "../a", "a..b", "..", ".", ".hidden", "-rf", "", " a", "a b", "a\nb", "ä", "a\0", "a" * 101, "/a"]
)
def test_a_name_that_is_no_folder_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="cannot name a folder"):
        parse(name=name)


@pytest.mark.parametrize("name", ["a", "A-1_b.c", "0", "a" * 100, "pair_llama31_8b"])
def test_a_name_that_is_a_folder_is_taken(name: str) -> None:
    assert parse(name=name).name == name


@pytest.mark.parametrize(
    "text",
    ["", "- a", "7", "a: [", "\t", "\0", "!!python/object:os.system {}", "name: 2001-99-99", "{a: b", "&a [*a]",
     "name: !!int x", "[" * 1000, "? [a]\n: b", "name: !!binary x"],
)  # fmt: skip
def test_a_file_that_is_no_config_is_refused_by_name(write: Write, text: str) -> None:
    path = write(text)
    with pytest.raises(ConfigError, match=re.escape(str(path))):
        load_config(path)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "a.yaml")


def test_a_missing_file_is_answered_with_those_that_are_there(write: Write, tmp_path: Path) -> None:
    write(PLAIN, "one.yaml")
    write(PLAIN, "two.yaml")
    with pytest.raises(ConfigError, match=r"there is no config .*three.yaml; .* has: one.yaml, two.yaml"):
        load_config(tmp_path / "three.yaml")
    with pytest.raises(ConfigError, match=r"there is no config .*four.yaml"):
        load_config(write({"base": "four.yaml"}, "five.yaml"))


def test_a_folder_is_no_config(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path)


@pytest.mark.parametrize("base", ["[a.yaml]", "7", "{a: b}"])
def test_a_base_is_one_file(write: Write, base: str) -> None:
    with pytest.raises(ConfigError, match="one file"):
        load_config(write(f"base: {base}"))


def test_bases_that_lead_back_are_refused(write: Write) -> None:
    write({"base": "c.yaml"}, "b.yaml")
    write({"base": "a.yaml"}, "c.yaml")
    with pytest.raises(ConfigError, match=r"leads back to itself \(a.yaml -> b.yaml -> c.yaml\)"):
        load_config(write({"base": "b.yaml"}, "a.yaml"))
    with pytest.raises(ConfigError, match="leads back to itself"):
        load_config(write({"base": "self.yaml"}, "self.yaml"))


@pytest.mark.parametrize("override", ["", "seed", "=3", ".seed=3", "a..b=3", "seed.=3", "seed=[", "seed=2001-99-99"])
def test_an_override_that_is_none_is_refused(write: Write, override: str) -> None:
    with pytest.raises(ConfigError, match="override"):
        load_config(write(PLAIN), [override])


# ---- Targets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "target", ["", "json", ":a", "json:", "json:a.b", "json:1", ".json:a", "..json:a", "a b:c", "json::a", "/json:a"]
)
def test_a_target_of_another_form_is_refused(target: str) -> None:
    with pytest.raises(ConfigError, match=r"workload\.target"):
        parse(workload={"target": target})


@pytest.mark.parametrize("target", ["no_such_package.at_all:A", "no_such_file.py:A", "/no/such/file.py:A"])
def test_a_target_that_is_not_there(target: str) -> None:
    with pytest.raises(WorkloadError, match=r"workload\.target"):
        parse(workload={"target": target})


def test_a_missing_name_is_answered_with_those_that_are_there() -> None:
    with pytest.raises(WorkloadError, match=r"has no 'JSONDecodr'; it has: .*JSONDecoder"):
        load_target("json:JSONDecodr")


def test_a_target_in_a_file(write: Write) -> None:
    path = write(
        "import pydantic\nclass Options(pydantic.BaseModel):\n    width: int = 3\ndef mine(): ...\n", "mine_x.py"
    )
    target = f"{path}:mine"
    assert load_target(target).__name__ == "mine"
    assert parse(workload={"target": target}).workload.options == {"width": 3}, "defaults are part of the identity"
    with pytest.raises(ConfigError, match=r"workload\.options\.width: .*integer"):
        parse(workload={"target": target, "options": {"width": "wide"}})


def test_a_file_named_as_a_module_that_is_loaded_is_refused(write: Write) -> None:
    with pytest.raises(WorkloadError, match="rename it"):
        load_target(f"{write('', 'json.py')}:A")


def test_a_module_without_options_takes_any() -> None:
    assert options_model(TARGET) is None
    assert parse(workload={"target": TARGET, "options": {"any": [1, {"thing": None}]}}).workload.options


# ---- Round trips and identity ----------------------------------------------------------------------------------------

SMALL = st.integers(1, 1000)
POSITIVE = st.floats(1e-12, 1e12)
FRACTION = st.floats(0, 1)
PRINTABLE = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
OPTIONS = st.dictionaries(
    PRINTABLE,
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | PRINTABLE,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(PRINTABLE, inner, max_size=3),
        max_leaves=5,
    ),
    max_size=3,
)


def some(**keys: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Any of these keys."""
    return st.fixed_dictionaries({}, optional=keys)


OPTIMIZER = some(lr=POSITIVE, betas=st.tuples(FRACTION, FRACTION).map(list), eps=POSITIVE, weight_decay=POSITIVE)
TRAIN = some(
    steps=st.integers(101, 10**7),
    micro_batch=st.sampled_from([1, 2, 4, "auto"]),
    global_batch=SMALL.map(lambda number: 8 * number),
    precision=st.sampled_from(["auto", "bf16", "fp16", "fp32"]),
    optimizer=OPTIMIZER,
    schedule=some(warmup_steps=st.integers(0, 100), min_lr_ratio=FRACTION),
    grad_clip=st.none() | POSITIVE,
    ema_decay=st.none() | st.floats(0, 0.999),
    eval_every=st.none() | SMALL,
    deterministic=st.booleans(),
)
OPERATIONAL = some(
    data=some(workers=st.integers(0, 9), prefetch=SMALL),
    checkpoint=some(interval_s=st.none() | POSITIVE, keep=SMALL, best_metric=st.none() | PRINTABLE, threads=SMALL),
    preemption=some(grace_s=POSITIVE, save_signal=st.sampled_from(["USR1", "USR2", "none"])),
    monitor=some(interval_s=POSITIVE),
    retry=some(oom=SMALL, lost=SMALL, network_backoff_s=POSITIVE),
    elastic=some(num_ranks=SMALL),
    scheduler=some(
        kind=st.sampled_from(["auto", "local", "slurm"]),
        partition=st.none() | PRINTABLE,
        gpus=st.none() | SMALL | st.just([4, 2, 1]),
        requeue=st.booleans(),
        extra=st.dictionaries(st.sampled_from(sorted(EXTRA)), PRINTABLE | st.booleans() | st.integers(), max_size=3),
    ),
)
RESULT = st.fixed_dictionaries(
    {
        "name": st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_-]{0,20}", fullmatch=True),
        "workload": st.fixed_dictionaries({"target": st.just(TARGET)}, optional={"options": OPTIONS}),
    },
    optional={"seed": st.integers(0, 2**63 - 1), "train": TRAIN},
)


@example({"name": "a", "workload": {"target": TARGET, "options": {"\x85": " \x85\n"}}}, {})
@given(RESULT, OPERATIONAL)
def test_a_config_reads_back_from_its_yaml(result: dict[str, Any], operational: dict[str, Any]) -> None:
    config = parse_config(result | operational, "here")
    again = parse_config(yaml.safe_load(config.to_yaml()), "there")
    assert again == config
    assert again.digest() == config.digest()
    assert again.to_yaml() == config.to_yaml()


@given(RESULT, OPERATIONAL, OPERATIONAL)
def test_settings_of_operation_are_not_of_the_identity(
    result: dict[str, Any], one: dict[str, Any], other: dict[str, Any]
) -> None:
    configs = [parse_config(result | operational, "here") for operational in (one, other)]
    assert configs[0].digest() == configs[1].digest()
    assert differences(configs[0].identity(), configs[1].identity()) == []


@pytest.mark.parametrize(
    "change",
    [{"seed": 1}, {"train": {"steps": 1001}}, {"train": {"optimizer": {"betas": [0.9, 0.951]}}},
     {"train": {"cpu_threads": 3}}, {"elastic": {"exact": False}},
     {"workload": {"target": TARGET, "options": {"a": 1}}}],
    ids=str,
)  # fmt: skip
def test_what_decides_the_result_is_of_the_identity(change: dict[str, Any]) -> None:
    assert parse(**change).digest() != parse().digest()


def test_the_identity_is_that_of_every_version_before() -> None:
    """Checkpoints carry it: where it changes for an unchanged config, no run can be resumed."""
    assert parse().digest() == "568a20b8e6eadc71cec33955843ea57965490814875397d629b94880034657ee"


def test_differences_name_every_leaf() -> None:
    old = {"a": {"b": 1, "c": [1, 2]}, "gone": 3, "same": 4}
    new = {"a": {"b": 2, "c": [1, 3]}, "same": 4, "came": {"x": 5}}
    assert differences(old, new) == [
        "a.b: 1 -> 2", "a.c: [1, 2] -> [1, 3]", "gone: 3 -> (absent)", "came: (absent) -> {'x': 5}",
    ]  # fmt: skip


# ---- The configs that are shipped ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", [p for p in sorted((REPOSITORY / "configs").rglob("*.yaml")) if p.name != "base.yaml"], ids=lambda p: p.stem
)
def test_a_shipped_config_loads_and_is_named_as_its_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    configs = load_fleet(path).configs
    names = [config.name for config in configs]
    assert names == [path.stem] or all(name.startswith(f"{path.stem}-") for name in names)
    for config in configs:
        assert parse_config(yaml.safe_load(config.to_yaml()), "there") == config


@pytest.mark.parametrize(("page", "keys"), [("README.md", {"checkpoint"}), ("docs/watching.md", {"alerts", "monitor"})])
def test_the_sections_that_a_page_shows_are_those_of_a_config(page: str, keys: set[str]) -> None:
    blocks = re.findall(r"^```yaml\n(.*?)^```$", (REPOSITORY / page).read_text(encoding="utf-8"), re.M | re.S)
    shown = [tree for block in blocks if "base" not in (tree := yaml.safe_load(block))]  # else it is a whole file
    assert {key for tree in shown for key in tree} == keys
    for tree in shown:
        parsed = parse(**tree).model_dump(mode="json")
        for key, section in tree.items():
            assert parsed[key] | section == parsed[key]


def test_all_errors_are_of_one_family() -> None:
    assert issubclass(ConfigError, LatentWireError)
    assert issubclass(WorkloadError, LatentWireError)


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "twice.yaml"
    path.write_text(
        "name: x\nworkload: {target: script}\ntrain: {steps: 3}\ntrain: {micro_batch: 4}\n", encoding="utf-8"
    )
    with pytest.raises(ConfigError, match="'train' stands twice"):
        load_config(path)


@pytest.mark.parametrize(
    "webhook", ["https://ada:secret@hooks.example/x", "$A B", "hooks.example", "file:///etc/passwd"]
)
def test_a_webhook_is_a_url_without_a_password_or_a_variable(webhook: str) -> None:
    tree = {"name": "a", "workload": {"target": "json:JSONDecoder"}, "alerts": {"webhook": webhook}}
    with pytest.raises(ConfigError, match=r"alerts.webhook: give an http\(s\) URL without a password, or \$NAME"):
        parse_config(tree, "here")


def test_alerts_are_operational_and_survive_the_run_directory() -> None:
    tree = {"name": "a", "workload": {"target": "json:JSONDecoder"}}
    alerts = {"webhook": "$HOOK", "command": ["notify", "--now"], "temperature_c": None, "checkpoint_age_s": 60}
    changed = parse_config({**tree, "alerts": alerts}, "here")
    assert changed.digest() == parse_config(tree, "here").digest()
    assert parse_config(yaml.safe_load(changed.to_yaml()), "here") == changed
    with pytest.raises(ConfigError, match="name a program"):
        parse_config({**tree, "alerts": {"command": []}}, "here")
