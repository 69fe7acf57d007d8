"""FLANet as a recipe: networks, data sets, training and evaluation.

`models` holds the network and its head, `data` the readers of data sets, `training` and
`evaluation` what `fullattn train`, `evaluate` and `predict` run. timm, Lightning and torchmetrics
import torchvision, whose compiled operators do not load beside every PyTorch: see
`fullattn.integrations.torchvision`.
"""

from fullattn.integrations.torchvision import ensure_importable

ensure_importable()
