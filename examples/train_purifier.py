"""Train a purifier: on clean digits, then on adversarial ones, and see what each was worth.

`atop-fast train PRESET` does this from a YAML file, resumably and on several GPUs (docs/training.md); here are the same
functions, one by one.
"""

from __future__ import annotations

import copy

from digits import FOLDER, arguments, classifier, digits

import atop_fast as atop

EPS = 0.25


def main() -> None:
    """Pre-train, fine-tune, evaluate both."""
    args = arguments(__doc__)
    train, test = digits(args.quick)
    judge = classifier(train, args.quick)
    transform = atop.RT2(patch=4, sigma=0.25)
    options = {"channels": 1, "width": 4 if args.quick else 8}
    purifier = atop.build_purifier("unet", **options)

    epochs = 1 if args.quick else 3
    config = atop.PretrainConfig(epochs, batch_size=32, lr=2e-3, gan_weight=0)
    atop.pretrain(purifier, transform, train.images, config=config)
    pretrained = copy.deepcopy(purifier)

    config = atop.FinetuneConfig(epochs, lr=3e-3, gan_weight=0, ce_weight=2, attack="pgd", steps=3, eps=EPS)
    atop.finetune(atop.Defense(transform, purifier, judge), train.images, train.labels, config=config)
    path = FOLDER / "purifier.safetensors"
    atop.save_model(path, purifier)

    for name, model in {"pre-trained": pretrained, "fine-tuned": atop.load_model(path)}.items():
        defense = atop.Defense(transform, model, judge).eval()
        attack = atop.PGD(defense, eps=EPS, steps=2 if args.quick else 80, momentum=0.9, schedule="cosine")
        report = atop.evaluate(defense, test.images, test.labels, eps=EPS, attacks={"pgd": attack})
        low, high = report.robust.mean_ci
        print(f"{name}: clean {report.clean.mean:.3f}, robust {report.robust.mean:.3f} [{low:.3f}, {high:.3f}]")


if __name__ == "__main__":
    main()
