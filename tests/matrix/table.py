"""What users are told of the Trainer's features: the README's table."""

# What users are told: (feature, "works" or "refused", note)
COMPATIBILITY: list[tuple[str, str, str]] = [
    ("a plain fit with validation", "works", "same weights, logs and checkpoints to the last bit"),
    ("gradient clipping by norm", "works", "clips the final gradient, never the one SAM climbs with"),
    ("gradient clipping by value", "works", "clips the final gradient, never the one SAM climbs with"),
    ("configure_gradient_clipping overridden", "works", "called once per step, with the final gradient"),
    ("gradient accumulation", "works", "the whole window counts as one batch, a short last one too"),
    ("GradientAccumulationScheduler", "works", ""),
    ("learning-rate schedulers per step", "works", ""),
    ("learning-rate schedulers per epoch", "works", ""),
    ("ReduceLROnPlateau", "works", "sees the unperturbed loss"),
    ("lr_scheduler_step overridden", "works", ""),
    ("a scheduler that is not torch's", "works", ""),
    ("precision bf16-mixed", "works", ""),
    ("precision bf16-true", "works", ""),
    ("precision 16-true", "works", ""),
    ("precision 64-true", "works", ""),
    ("precision 16-mixed (GradScaler)", "works", "the scale cancels out of SAM and of the curvature estimates"),
    (
        "precision 16-mixed, overflowing steps",
        "works",
        "a skipped step is neither counted nor boosted; an estimate that overflows is made again at the next step",
    ),
    ("precision 16-mixed, steps without a loss", "works", ""),
    ("precision 16-mixed with a fused optimizer", "works", "Lightning itself refuses to clip gradients here"),
    ("training_step returning a dict", "works", ""),
    ("training_step returning None at times", "works", "these micro-batches take no part in the step"),
    ("training_step(batch) without batch_idx", "works", ""),
    (
        "batches of any structure, changed by the transfer hooks",
        "works",
        "the second pass gets the batch after the transfer; training_step must not change it in place",
    ),
    ("several training loaders (CombinedLoader)", "works", ""),
    ("training data without a length (IterableDataset)", "works", ""),
    ("optimizer_step overridden (warm-up by hand)", "works", ""),
    ("optimizer_step overridden (a step at every second batch)", "works", "as long as the closure runs at every batch"),
    ("optimizer_step and optimizer_zero_grad overridden to accumulate by hand", "works", ""),
    ("optimizer_step overridden (runs the closure before the step)", "works", ""),
    ("backward overridden", "works", "runs in the second pass too"),
    ("optimizer_zero_grad overridden", "works", ""),
    ("on_before_optimizer_step overridden (edits gradients)", "works", "called once per step, with the final gradient"),
    (
        "on_before_zero_grad overridden",
        "works",
        "called once per step; weights that it changes are changed for the second pass",
    ),
    (
        "on_before_backward and on_after_backward overridden (read only)",
        "works",
        "called once per micro-batch, with the unperturbed gradient",
    ),
    ("hooks on parameters and modules (register_hook, ...)", "works", "run in the second pass too"),
    ("on_train_batch_start returning -1", "works", "Lightning drops the window that was open"),
    ("ModelCheckpoint (every_n_train_steps, monitor, save_last)", "works", ""),
    ("EarlyStopping", "works", ""),
    ("LearningRateMonitor", "works", ""),
    ("WeightAveraging and EMAWeightAveraging", "works", "average the weights after the boost"),
    ("StochasticWeightAveraging", "works", "the pass that renews BatchNorm's statistics runs once"),
    ("LearningRateFinder and Tuner.lr_find", "works", "the search itself runs without the callback"),
    ("BatchSizeFinder and Tuner.scale_batch_size", "works", "the search itself runs without the callback"),
    ("BackboneFinetuning (parameters that join later)", "works", ""),
    ("profilers", "works", ""),
    ("max_steps", "works", "counts the same steps"),
    ("val_check_interval and check_val_every_n_epoch", "works", ""),
    ("limit_train_batches and limit_val_batches", "works", ""),
    ("overfit_batches", "works", ""),
    ("fast_dev_run", "works", ""),
    ("detect_anomaly", "works", ""),
    ("barebones", "works", "nothing is logged"),
    ("log_every_n_steps", "works", ""),
    ("reload_dataloaders_every_n_epochs", "works", ""),
    ("many of these at once", "works", ""),
    ("any first-order optimizer of torch", "works", ""),
    ("fused and foreach optimizers", "works", ""),
    ("optimizers around another (Lookahead)", "works", ""),
    ("parameter groups, parameters outside the optimizer", "works", ""),
    ("torch.compile of the module (eager)", "works", ""),
    ("torch.compile of the module (aot_eager)", "works", ""),
    ("torch.compile of the module (inductor)", "works", "to rounding where batches change their size"),
    ("torch.compile of a part (eager)", "works", ""),
    ("torch.compile of a part (aot_eager)", "works", ""),
    (
        "torch.compile of a part (inductor)",
        "works",
        "to rounding where batches change their size; SampledFisher runs a forward pass of its own, with a warning",
    ),
    (
        "activation checkpointing (reentrant)",
        "works",
        "an estimate by SampledFisher then runs a forward pass of its own, with a warning",
    ),
    ("activation checkpointing (non-reentrant)", "works", ""),
    ("self.log handed to other objects", "works", ""),
    ("nested LightningModules that log", "works", "what they log in the second pass is dropped"),
    ("frozen, unused, tied, scalar and empty parameters", "works", ""),
    ("sparse gradients", "works", ""),
    ("parametrizations (weight_norm, orthogonal)", "works", "SAM and IRE move the underlying parameters"),
    ("layers that compute with buffers they change (spectral_norm, queues)", "works", ""),
    ("differentiating inside training_step (gradient penalties)", "works", ""),
    ("recurrent and attention layers", "works", ""),
    (
        "on_after_backward overridden (edits gradients)",
        "refused",
        "edits of the first pass's gradient are lost in the second: edit in on_before_optimizer_step",
    ),
    ("FSDPStrategy (FSDP1)", "refused", "its parts of weights look like whole ones: use ModelParallelStrategy"),
    ("DeepSpeed", "refused", "its engine reduces, clips and steps by itself"),
    ("training_step(dataloader_iter)", "refused", "its batches cannot be replayed"),
    ("LBFGS", "refused", "it runs the closure several times per step"),
    ("DDP with static_graph, each device with its own SAM", "refused", "set `perturbation.sync` to true"),
    ("DDP", "works", "replicas are bit-identical after every step"),
    ("DDP with find_unused_parameters, gradient_as_bucket_view or static_graph", "works", ""),
    (
        "ModelParallelStrategy: fully_shard (FSDP2), tensor parallel, both",
        "works",
        "equal to one process, masks to the bit; SAM with `sync: true`, SampledFisher in batches: docs/sharded.md",
    ),
    ("resuming from a checkpoint", "works", "goes on bit for bit where Lightning itself does"),
    ("manual optimization, several optimizers", "works", "IRE around each step; SAM where step gets a closure"),
    ("manual optimization, SAM and step() without a closure", "refused", "the gradient cannot be taken again"),
]
# features of `COMPATIBILITY` that other tests than those of the table prove
ELSEWHERE = {
    "DDP": "test_ddp.py::test_replicas_are_bit_identical_after_every_step",
    "DDP with find_unused_parameters, gradient_as_bucket_view or static_graph": (
        "test_ddp.py::test_options_of_ddp_and_a_resume_change_nothing"
    ),
    "ModelParallelStrategy: fully_shard (FSDP2), tensor parallel, both": (
        "test_sharded.py::test_equals_one_process_on_the_joined_batch"
    ),
    "resuming from a checkpoint": "test_resume.py::test_killed_and_resumed_equals_never_interrupted",
    "manual optimization, several optimizers": "test_manual.py::test_every_optimizer_has_its_own_masks_and_counts",
    "manual optimization, SAM and step() without a closure": (
        "test_manual.py::test_sam_without_a_closure_is_an_error_that_says_what_to_do"
    ),
}


def compatibility_table() -> str:
    """`COMPATIBILITY` as the README shows it."""
    works_first = sorted(COMPATIBILITY, key=lambda line: line[1] == "refused")
    lines = [f"| {feature} | {verdict} | {note} |" for feature, verdict, note in works_first]
    return "\n".join(["| feature | | |", "| --- | --- | --- |", *lines])
