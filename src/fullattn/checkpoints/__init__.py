"""Weights that were trained with other projects' layers, in ours, and back.

`convert` renames and reshapes the state dict of one layer, and `load_into` loads it as well; `load`
reads a checkpoint without running anything in it. Which of our layers takes whose weights, and with
which options:

    >>> from fullattn import checkpoints
    >>> print(checkpoints.table())
    flanet  FullyAttentionalBlock(C)        FullyAttentional(C)
              batches as it saw them          mix_images=True
            FLANet(..., n_classes=K)        models.FLANet(K)
              deep_stem=False                 backbone='resnet101'
    timm    NonLocalAttn(C, rd_channels=D)  SpatialNonLocal(C, inner_channels=D, scale=C**-0.5)
              use_scale=False                 scale=1.0
    mmcv    NonLocal2d(C)                   SpatialNonLocal(C, scale=None, norm_layer=None)
              use_scale=False                 scale=1.0
              reduction=R                     inner_channels=C//R
              mode='gaussian'                 mode='gaussian', scale=1.0
              mode='dot_product'              mode='dot_product', scale=1.0
              mode='concatenation'            mode='concatenation'
              sub_sample=True                 subsample=2
              norm_cfg=dict(type='BN')        norm_layer=nn.BatchNorm2d
    danet   PAM_Module(C)                   SpatialNonLocal(C, inner_channels=C//8, project=False)
            mmseg's PAM(C, D)               SpatialNonLocal(C, inner_channels=D, project=False)
            CAM_Module(C), mmseg's CAM()    ChannelNonLocal(C, least_similar=True)

C is the number of channels. With these weights our layer computes what theirs does.
"""

from fullattn.checkpoints.conversion import convert, load_into
from fullattn.checkpoints.files import CheckpointError, load
from fullattn.checkpoints.mappings import table

__all__ = ["CheckpointError", "convert", "load", "load_into", "table"]
