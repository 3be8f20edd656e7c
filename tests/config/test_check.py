from __future__ import annotations

import time

import pytest

from megatron_vilg.config.check import check, check_image_tokenizer, require
from megatron_vilg.config.load import load_run_config
from megatron_vilg.config.presets import PRESETS
from megatron_vilg.errors import ConfigError

FOUR_LAYERS = "model.num_layers=4"


@pytest.mark.parametrize("name", PRESETS)
def test_presets_can_run(name: str) -> None:
    assert check(PRESETS[name]()) == []
    require(PRESETS[name]())


RULES = [
    (
        ["model.num_heads=5"],
        "model.num_heads=5: must divide model.width=256 into heads of even size. Works: 1, 2, 4, 8, 16, 32, 64, 128.",
    ),
    (
        ["model.num_heads=256"],
        "model.num_heads=256: must divide model.width=256 into heads of even size. Works: 1, 2, 4, 8, 16, 32, 64, 128.",
    ),
    (
        ["ops.attention=triton", "model.width=192"],
        "model.num_heads=4: makes heads of 48; ops.attention=triton takes 16, 32, 64, 128, 256. Works: 12, 6, 3.",
    ),
    (
        ["model.image_side=7"],
        "model.image_side=7: differs from the image tokenizer's grid (image_tokenizer.image_size=48 / 6 pixels per "
        "token). Works: 0, 8.",
    ),
    (
        ["model.image_vocab_size=500"],
        "model.image_vocab_size=500: differs from image_tokenizer.codebook_size=512. Works: 0, 512.",
    ),
    (
        ["model.conv_kernel=4"],
        "model.conv_kernel=4: must be odd and at most 15, which reaches all of a 8 x 8 grid. "
        "Works: 1, 3, 5, 7, 9, 11, 13, 15.",
    ),
    (
        ["model.conv_kernel=17"],
        "model.conv_kernel=17: must be odd and at most 15, which reaches all of a 8 x 8 grid. "
        "Works: 1, 3, 5, 7, 9, 11, 13, 15.",
    ),
    (
        ["model.codebook_dim=8"],
        "model.codebook_dim=8: differs from image_tokenizer.codebook_dim=16. Works: 0, 16.",
    ),
    (["model.dropout=1"], "model.dropout=1.0: must be below 1. Works: 0 to 0.99."),
    (
        ["text_tokenizer.vocab_size=200"],
        "text_tokenizer.vocab_size=200: must leave room for 6 special tokens and 256 bytes, and ids for 16 bits. "
        "Works: 263 to 65535.",
    ),
    (
        ["model.text_vocab_size=1000"],
        "model.text_vocab_size=1000: is below text_tokenizer.vocab_size=1200: some ids would have no embedding. "
        "Works: 0 or 1200 and more.",
    ),
    (
        ["model.text_vocab_size=70000"],
        "model.text_vocab_size=70000: ids are kept in 16 bits. Works: 0, or at most 65535.",
    ),
    (
        ["model.num_text_slots=70000"],
        "model.num_text_slots=70000: lengths are kept in 16 bits. Works: at most 65535.",
    ),
    (
        ["image_tokenizer.image_size=50"],
        "image_tokenizer.image_size=50: must be a multiple of 6, the pixels per token of patch and "
        "channel_multipliers. Works: 48, 54.",
    ),
    (
        ["image_tokenizer.norm_groups=7"],
        "image_tokenizer.norm_groups=7: must divide the channels of every level, [64, 128]. "
        "Works: 1, 2, 4, 8, 16, 32, 64.",
    ),
    (
        ["image_tokenizer.codebook_size=70000"],
        "image_tokenizer.codebook_size=70000: ids are kept in 16 bits. Works: at most 65535.",
    ),
    (["image_tokenizer.ema_decay=1"], "image_tokenizer.ema_decay=1.0: must be below 1. Works: 0 to 0.99."),
    (
        ["image_tokenizer_train.num_steps=1400", "image_tokenizer_train.warmup_steps=1400"],
        "image_tokenizer_train.warmup_steps=1400: must be below image_tokenizer_train.num_steps=1400. "
        "Works: 0 to 1399.",
    ),
    (
        ["image_tokenizer_train.continuous_fraction=0.9", "image_tokenizer_train.frozen_codebook_fraction=0.1"],
        "image_tokenizer_train.continuous_fraction=0.9: with image_tokenizer_train.frozen_codebook_fraction=0.1 no "
        "step is left in which the codebook learns. Works: two fractions with a sum below 1, such as 0.1 and 0.15.",
    ),
    (
        [
            "image_tokenizer_train.num_steps=2000",
            "image_tokenizer_train.critic_weight=0.5",
            "image_tokenizer_train.critic_start_step=5000",
        ],
        "image_tokenizer_train.critic_start_step=5000: the critic would never start within "
        "image_tokenizer_train.num_steps=2000. Works: 0 to 1999, or image_tokenizer_train.critic_weight=0.",
    ),
    (
        [
            "image_tokenizer_train.critic_weight=0.5",
            "image_tokenizer_train.critic_start_step=5",
            "image_tokenizer.image_size=18",
        ],
        "image_tokenizer_train.critic_weight=0.5: the critic needs pictures of at least 24 pixels "
        "(image_tokenizer.image_size). Works: 0.",
    ),
    (
        [
            "image_tokenizer_train.critic_weight=0.5",
            "image_tokenizer_train.critic_start_step=5",
            "image_tokenizer.kind=dvae",
        ],
        "image_tokenizer_train.critic_weight=0.5: a dVAE is trained by its likelihood, without a critic "
        "(image_tokenizer.kind=dvae). Works: 0, or image_tokenizer.kind=vqgan.",
    ),
    (
        ["image_tokenizer_train.betas=[0.9, 1]"],
        "image_tokenizer_train.betas=[0.9, 1.0]: a decay of 1 never forgets. Works: two numbers from 0 to below 1.",
    ),
    (
        ["optim.betas=[1, 0.9]"],
        "optim.betas=[1.0, 0.9]: a decay of 1 never forgets. Works: two numbers from 0 to below 1.",
    ),
    (
        ["train.num_steps=2500", "optim.warmup_steps=2500"],
        "optim.warmup_steps=2500: must be below train.num_steps=2500. Works: 0 to 2499.",
    ),
    (["loss.label_smoothing=1"], "loss.label_smoothing=1.0: must be below 1. Works: 0 to 0.99."),
    (
        ["loss.text_to_image_weight=0", "loss.image_to_text_weight=0"],
        "loss.text_to_image_weight=0.0: with loss.image_to_text_weight=0 too there is nothing to learn. "
        "Works: a number above 0 in one of the two.",
    ),
    (
        ["data.target_view_probability=0.5", "data.num_views=0"],
        "data.target_view_probability=0.5: there are no such copies with data.num_views=0. Works: 0, or more views.",
    ),
    (
        ["data.target_view_fall=0.5", "data.target_view_probability=0"],
        "data.target_view_fall=0.5: there is nothing to fall from with data.target_view_probability=0. "
        "Works: 0, or a probability above 0.",
    ),
    (
        ["train.rollback_factor=0.5"],
        "train.rollback_factor=0.5: losses at their own mean would already be above it. Works: 0 (off), or above 1, "
        "such as 1.5.",
    ),
    (["sample.top_p=0"], "sample.top_p=0.0: would keep no token at all. Works: above 0, up to 1."),
    (
        ["train.batch_size=12", "parallel.num_microbatches=5"],
        "train.batch_size=12: must divide by replica x shard x parallel.num_microbatches = 1 x 1 x 5. Works: 10, 15.",
    ),
    (
        ["parallel.shard=0"],
        "parallel.shard=0: is no number of ranks. Works: -1 (all that is left), or 1 and more.",
    ),
    (
        ["parallel.shard=2"],
        "parallel.shard=2: tensor x pipeline x replica x shard = 1 x 1 x 1 x 2 does not give the number of processes, "
        "1. Works: -1, 1.",
    ),
]


@pytest.mark.parametrize(("overrides", "message"), RULES, ids=[overrides[0] for overrides, _ in RULES])
def test_each_rule_has_its_message(overrides: list[str], message: str) -> None:
    assert message in check(load_run_config("demo", overrides=overrides))


@pytest.mark.parametrize(("overrides", "message"), RULES, ids=[overrides[0] for overrides, _ in RULES])
def test_one_mistake_is_one_problem(overrides: list[str], message: str) -> None:
    found = check(load_run_config("demo", overrides=overrides))
    secondary = [problem for problem in found if problem != message]
    # A grid of another size, or ids beyond 16 bits, rightly break a second rule.
    assert all(problem.startswith(("model.conv_kernel", "model.image_side")) for problem in secondary), secondary


def test_full_attention_has_no_kernel_to_check() -> None:
    assert check(load_run_config("demo", overrides=["model.conv_kernel=4", "model.pattern=full"])) == []


@pytest.mark.parametrize(
    ("overrides", "world_size", "message"),
    [
        (
            ["parallel.tensor=3"],
            3,
            "parallel.tensor=3: must divide model.num_heads=4 and the row length=80 and model.image_vocab_size=512. "
            "Works: 1, 2, 4.",
        ),
        (["parallel.pipeline=5"], 5, "parallel.pipeline=5: must not exceed model.num_layers=4. Works: 1 to 4."),
        (
            ["parallel.tensor=4"],
            6,
            "parallel.tensor=4: tensor x pipeline x replica x shard = 4 x 1 x 1 x -1 does not give the number of "
            "processes, 6. Works: tensor x pipeline x replica = 1, 2, 3, 6.",
        ),
        (
            ["parallel.tensor=2", "parallel.shard=3"],
            8,
            "parallel.shard=3: tensor x pipeline x replica x shard = 2 x 1 x 1 x 3 does not give the number of "
            "processes, 8. Works: -1, 4.",
        ),
        (
            ["parallel.replica=2", "parallel.tensor=4", "parallel.shard=2"],
            4,
            "parallel.tensor=4: tensor x pipeline x replica x shard = 4 x 1 x 2 x 2 does not give the number of "
            "processes, 4. Works: tensor x pipeline x replica = 1, 2, 4, with parallel.shard=-1.",
        ),
        (
            ["parallel.tensor=2", "model.dropout=0.05"],
            2,
            "model.dropout=0.05: with parallel.tensor=2 ranks would drop different values of what they share. "
            "Works: 0, or parallel.tensor=1.",
        ),
        (
            ["parallel.tensor=2", "model.text_vocab_size=1201"],
            2,
            "parallel.tensor=2: must divide model.text_vocab_size=1201. Works: 1, or in a new run folder "
            "text_tokenizer.vocab_size=1200.",
        ),
        (
            ["parallel.schedule=interleaved"],
            1,
            "parallel.schedule=interleaved: needs parallel.pipeline of 2 and more. Works: 1f1b.",
        ),
        (
            ["parallel.schedule=interleaved", "parallel.pipeline=2", "parallel.stages_per_rank=3"],
            2,
            "parallel.stages_per_rank=3: schedule=interleaved needs 2 and more, in all at most model.num_layers=4. "
            "Works: 2 to 2.",
        ),
        (
            ["parallel.schedule=interleaved", "parallel.pipeline=2", "parallel.num_microbatches=3"],
            2,
            "parallel.num_microbatches=3: schedule=interleaved goes in rounds of parallel.pipeline=2. Works: 4, 8.",
        ),
        (
            ["parallel.pipeline=2"],
            2,
            "parallel.num_microbatches=1: every rank of parallel.pipeline=2 needs one to work on. "
            "Works: 2 and more, better 8.",
        ),
        (
            ["parallel.stages_per_rank=2", "parallel.pipeline=2"],
            2,
            "parallel.stages_per_rank=2: only schedule=interleaved has more than one stage on a rank. Works: 1.",
        ),
        (
            ["parallel.cpu_offload=true"],
            1,
            "parallel.cpu_offload=True: is for sharded weights, and there is one process. "
            "Works: false, more processes, or train.engine=deepspeed.",
        ),
    ],
)
def test_layout_rules(overrides: list[str], world_size: int, message: str) -> None:
    assert message in check(load_run_config("demo", overrides=[FOUR_LAYERS, *overrides]), world_size)


def test_require_reports_every_problem_in_one_error() -> None:
    run = load_run_config("demo", overrides=["model.num_heads=5", "optim.warmup_steps=9999", "sample.top_p=0"])
    with pytest.raises(ConfigError) as caught:
        require(run)
    assert str(caught.value).startswith("3 problems in the configuration\n  model.num_heads=5: ")


@pytest.mark.parametrize(
    ("overrides", "world_size"),
    [
        (["model.dropout=0", "parallel.tensor=2", "parallel.pipeline=2", "parallel.num_microbatches=4"], 4),
        (["parallel.replica=2", "parallel.zero=2"], 4),
        (
            [
                "parallel.pipeline=2",
                "parallel.schedule=interleaved",
                "parallel.stages_per_rank=2",
                "parallel.num_microbatches=2",
            ],
            2,
        ),
    ],
)
def test_layouts_that_can_run(overrides: list[str], world_size: int) -> None:
    assert check(load_run_config("demo", overrides=[FOUR_LAYERS, *overrides]), world_size) == []


@pytest.mark.parametrize("section", ["train", "image_tokenizer_train"])
def test_a_batch_has_a_limit(section: str) -> None:
    problem = f"{section}.batch_size={10**20}: is more than one step can take. Works: 1 to 1048576."
    assert check(load_run_config("demo", overrides=[f"{section}.batch_size={10**20}"])) == [problem]
    assert check(load_run_config("demo", overrides=[f"{section}.batch_size={2**20}"])) == []


@pytest.mark.parametrize(("width", "works"), [(3, "8"), (11, "8, 16"), (17, "16, 24")])
def test_an_odd_width_has_no_number_of_heads(width: int, works: str) -> None:
    problems = check(load_run_config("demo", overrides=[f"model.width={width}", "model.num_heads=4"]))
    rule = "must be a multiple of 2 x model.num_heads=4: heads have an even size"
    assert problems == [f"model.width={width}: {rule}. Works: {works}."]


@pytest.mark.parametrize(
    "override",
    [
        "model.num_layers=1000000000",
        "model.width=1000000006",
        "model.num_heads=1000000000000007",
        "model.image_side=1000000",
        "parallel.tensor=1000000000039",
        "parallel.num_microbatches=1000000000039",
        "image_tokenizer.channels=1000000000039",
        "image_tokenizer.norm_groups=1000000000039",
        "image_tokenizer.image_size=1000000000039",
    ],
)
def test_sizes_beyond_reason_are_refused_at_once(override: str) -> None:
    """Looking for numbers that divide them would take minutes to years."""
    run = load_run_config("demo", overrides=[override])
    start = time.process_time()
    problems = check(run)
    assert time.process_time() - start < 1.0
    name, _, value = override.partition("=")
    assert [problem for problem in problems if problem.startswith(f"{name}={value}: is more than")]
    if name.startswith("image_tokenizer."):
        (problem,) = check_image_tokenizer(run.image_tokenizer)
        assert problem in problems


def test_a_job_has_a_limit_and_levels_do() -> None:
    assert check(load_run_config("demo"), 10**12) == [
        "1000000000000 processes: are more than a job can have. Works: 1 to 1048576."
    ]
    run = load_run_config("demo", overrides=[f"image_tokenizer.channel_multipliers={[1] * 10_000}"])
    assert check(run) == ["image_tokenizer.channel_multipliers: has 10000 levels. Works: 1 to 16."]
