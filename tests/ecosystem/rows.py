"""The rows: optimizers, losses, networks and steps of other people, one each."""

from collections.abc import Iterator

from cases import CLASSES, FEATURES
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelPruning
from modules import Net
from torch import nn

from ecosystem.batches import images, pictures_with_boxes, pictures_with_points, words
from ecosystem.modules import (
    HIDDEN,
    Anchored,
    AveragedInside,
    Detector,
    Discriminating,
    Exercise,
    Experts,
    LowRank,
    Mixout,
    MomentumContrast,
    OwnLatent,
    Players,
    Pruned,
    Remembering,
    Routed,
    SelfDistilled,
    Tied,
    WithLossWeights,
    WithTeacher,
    adapted,
    adapted_to_tasks,
    balanced,
    binary_cross_entropy,
    connectionist,
    contrast,
    denoised,
    denoiser,
    focal,
    negative_log_likelihood,
    pair,
    parametrized,
    quantized,
    residual,
    squared_error,
    stopped_gradient,
    sum_of_losses,
    three_terms,
    triplet,
    variational,
    with_entropy_penalty,
    with_gradient_penalty,
    with_loss,
    with_net,
    with_square_penalty,
)
from ecosystem.optimizers import (
    NO_QUEUES,
    OTHERS,
    PACKAGE,
    TORCH,
    VARIANTS,
    Continual,
    KeepsNorms,
    Kronecker,
    by_width,
    of_package,
    of_torch,
    with_optimizer,
    wrapped,
)
from ecosystem.packages import (
    adapters,
    bert,
    faster_rcnn,
    gpt2,
    llama,
    of_timm,
    shufflenet,
    soft_targets,
    timms_optimizer,
    vision_transformer,
)
from ecosystem.runs import Row
from lightning_ire import EmpiricalFisher


def optimizer_rows() -> Iterator[Row]:
    for name, settings in TORCH.items():
        module = with_optimizer(name, of_torch(name, **settings))
        yield Row(f"torch-{name.lower()}", "optimizers of torch", name, module)
    for name, variant, settings in VARIANTS:
        module = with_optimizer(name, of_torch(name, **{variant: True}, **settings))
        kind, slow = "fused and foreach optimizers", (name in ("SGD", "AdamW")) is (variant == "foreach")
        yield Row(f"torch-{name.lower()}-{variant}", kind, f"{name} ({variant})", module, slow=slow)
    kind = "optimizers of pytorch_optimizer"
    for name, title in PACKAGE.items():
        yield Row(name, kind, title, with_optimizer(name, of_package(name)))
    atan2 = of_package("prodigy", eps=None)
    yield Row("prodigy-atan2", kind, "Prodigy with the arctangent for eps", with_optimizer("", atan2))
    for name in OTHERS:
        resumes: bool | str = NO_QUEUES if name == "adashift" else True
        module = with_optimizer(name, of_package(name))
        weekly = name != OTHERS[0]
        yield Row(f"other-{name}", kind, module=module, resumes=resumes, slow=True, weekly=weekly)


ROWS: list[Row] = [
    *optimizer_rows(),
    Row("lookahead", "optimizers around another", "Lookahead", with_optimizer("", wrapped("Lookahead"))),
    Row("orthograd", "optimizers around another", "OrthoGrad", with_optimizer("", wrapped("OrthoGrad")), slow=True),
    Row("trac", "optimizers around another", "TRAC", with_optimizer("", wrapped("TRAC")), slow=True),
    Row(
        "keeps-norms",
        "own optimizers",
        "weights of fixed norm (LAWN)",
        with_optimizer("", lambda module: KeepsNorms(module.parameters())),
    ),
    Row("by-width", "own optimizers", "a learning rate per width (muP)", with_optimizer("", by_width)),
    Row("kfac", "own optimizers", "K-FAC by hooks with `in_extra_pass()`", with_optimizer("", Kronecker)),
    Row(
        "core",
        "own optimizers",
        "sizes of steps by signs (CoRe)",
        with_optimizer("", lambda module: Continual(module.parameters())),
    ),
    # losses
    Row("nll", "losses", "nll_loss of log_softmax", with_loss(negative_log_likelihood)),
    Row("bce", "losses", "binary_cross_entropy_with_logits", with_loss(binary_cross_entropy)),
    Row("mse", "losses", "mse_loss", with_loss(squared_error)),
    Row("focal", "losses", "focal loss", with_loss(focal)),
    Row("ctc", "losses", "ctc_loss", with_loss(connectionist), EmpiricalFisher),
    Row("triplet", "losses", "triplet_margin_loss", with_loss(triplet), EmpiricalFisher),
    Row("squares", "penalties and weights in the loss", "squared weights", with_loss(with_square_penalty)),
    Row("entropy", "penalties and weights in the loss", "entropy of the prediction", with_loss(with_entropy_penalty)),
    Row(
        "gradient-norm",
        "penalties and weights in the loss",
        "norm of the gradient",
        with_loss(with_gradient_penalty),
    ),
    Row("learned-weights", "penalties and weights in the loss", "learned weights of several losses", WithLossWeights),
    Row("distillation", "teachers and memories", "distillation from a frozen teacher", WithTeacher),
    Row("memory", "teachers and memories", "a buffer of past predictions in the loss", Remembering),
    Row("ewc", "teachers and memories", "anchors and a Fisher diagonal as buffers (EWC)", Anchored),
    Row(
        "average-callback",
        "teachers and memories",
        "diffusion with EMAWeightAveraging",
        with_loss(denoised, denoiser),
        callbacks=lambda: [EMAWeightAveraging(decay=0.9)],
    ),
    Row("average-inside", "teachers and memories", "diffusion with an EMA moved in `training_step`", AveragedInside),
    # steps
    Row("info-nce", "self-supervised steps", "InfoNCE", with_loss(contrast)),
    Row(
        "simsiam",
        "self-supervised steps",
        "SimSiam",
        with_loss(
            stopped_gradient, lambda: pair(Net(batch_norm=True), nn.Linear(CLASSES, CLASSES), "encoder", "predictor")
        ),
        EmpiricalFisher,
    ),
    Row("byol", "self-supervised steps", "BYOL", OwnLatent, EmpiricalFisher),
    Row("moco", "self-supervised steps", "MoCo", MomentumContrast),
    Row("dino", "self-supervised steps", "DINO", SelfDistilled, EmpiricalFisher),
    Row("vicreg", "self-supervised steps", "VICReg", with_loss(three_terms)),
    Row(
        "vae",
        "other steps",
        "variational autoencoder",
        with_loss(variational, lambda: pair(Net(), nn.Linear(CLASSES // 2, FEATURES), "encoder", "decoder")),
        EmpiricalFisher,
    ),
    Row(
        "detection",
        "other steps",
        "a dict of losses, targets of any number",
        with_loss(sum_of_losses, Detector),
        batches=pictures_with_points,
    ),
    Row("experts", "other steps", "experts without a gradient at times", with_net(Experts)),
    Row("routed", "other steps", "a mixture of experts with routing per sample", lambda: Exercise(Routed(), balanced)),
    Row("wgan", "other steps", "GANs with a gradient penalty (two optimizers)", Players, EmpiricalFisher),
    Row("gan", "other steps", module=Discriminating, slow=True),
    Row("physics", "other steps", "physics-informed losses", with_loss(residual)),
    Row("maml", "other steps", "MAML", with_loss(adapted)),
    Row("maml-tasks", "other steps", "MAML by torch.func", with_loss(adapted_to_tasks), EmpiricalFisher),
    # weights
    Row(
        "mixout",
        "weights",
        "mixout",
        with_net(lambda: nn.Sequential(Mixout(FEATURES, HIDDEN), nn.Tanh(), Mixout(HIDDEN, CLASSES))),
    ),
    Row("tied", "weights", "tied matrices and shared kernels", with_net(Tied)),
    Row("parametrized", "weights", "parametrize and weight_norm", with_net(parametrized)),
    Row("pruned", "weights", "torch.nn.utils.prune", Pruned),
    Row(
        "model-pruning",
        "weights",
        "ModelPruning",
        callbacks=lambda: [ModelPruning("l1_unstructured", amount=0.2)],
        resumes="the callback saves the pruned weights without their masks",
    ),
    Row(
        "lora",
        "weights",
        "LoRA by hand",
        with_net(lambda: nn.Sequential(LowRank(nn.Linear(FEATURES, HIDDEN)), nn.Tanh(), nn.Linear(HIDDEN, CLASSES))),
    ),
    Row("quantized", "weights", "quantization-aware training", with_net(lambda: quantized(fused=False))),
    Row("quantized-fused", "weights", module=with_net(lambda: quantized(fused=True)), slow=True),
    # other packages
    Row("bert", "Hugging Face models", "BERT (classes)", bert, batches=words("classes"), slow=True),
    Row("peft", "peft", "LoRA in BERT", adapters, batches=words("classes"), slow=True),
    Row("gpt2", "Hugging Face models", "GPT-2", gpt2, batches=words("tokens"), slow=True),
    Row("llama", "Hugging Face models", "Llama", llama, batches=words("tokens"), slow=True),
    Row("vit", "Hugging Face models", "ViT", vision_transformer, batches=images(named=True), slow=True),
    Row(
        "timm-vit",
        "timm",
        "Vision Transformer",
        of_timm(
            "vit_tiny_patch16_224", img_size=16, patch_size=8, depth=2, embed_dim=24, num_heads=2, drop_path_rate=0.2
        ),
        batches=images(),
        slow=True,
    ),
    Row(
        "timm-convolutions",
        "timm",
        "a convolutional network with BatchNorm",
        of_timm("mobilenetv3_small_050", drop_rate=0.2),
        batches=images(size=32),
        slow=True,
    ),
    Row("timm-mixup", "timm", "Mixup and SoftTargetCrossEntropy", soft_targets, EmpiricalFisher, images(), slow=True),
    Row("timm-lamb", "timm", "an optimizer by create_optimizer_v2", timms_optimizer, slow=True),
    Row("shufflenet", "torchvision", "ShuffleNet", shufflenet, batches=images(size=32), slow=True),
    Row("faster-rcnn", "torchvision", "Faster R-CNN", faster_rcnn, batches=pictures_with_boxes, slow=True),
]
