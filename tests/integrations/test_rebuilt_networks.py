"""Networks that a framework builds again: what was inserted is saved, and loaded elsewhere.

Each framework saves in one process and loads in another, which checks the result of the first.
"""

from __future__ import annotations

import json
import os
import re
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fullattn
from helpers.networks import load
from helpers.processes import run_program

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.timeout(200)]

COMMON = """
import sys, warnings
warnings.simplefilter("ignore")
from pathlib import Path
import torch, fullattn
from torch import nn
from fullattn.integrations.torchvision import ensure_importable
ensure_importable()

def check(net, x, change=None):
    net.eval()
    with torch.no_grad():
        y = net(x)
        y = getattr(y, "logits", y)
        if change is None:
            # Kernels depend on the alignment of weights, which is another in each process.
            torch.testing.assert_close(y, torch.load("expected.pt"), rtol=1e-4, atol=1e-6)
        else:
            torch.save(y, "expected.pt")

def activate(net):
    "Let the layers have an effect."
    for module in net.modules():
        if isinstance(module, fullattn.layers.AttentionLayer):
            for parameter in module.parameters():
                nn.init.normal_(parameter, std=0.3)
x = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
"""


# What programs import, once for all of them.
SETUP = """
import torch
from fullattn.integrations.torchvision import ensure_importable
ensure_importable()
"""


def run(folder: Path, program: str, common: str = "") -> str:
    """Run a program in a new process; what `common` imports first is imported once."""
    imported = re.search(r"^(?:import|from) (\w+)", common, re.MULTILINE)
    done = run_program(
        COMMON + textwrap.dedent(common) + textwrap.dedent(program),
        setup=SETUP + (f"import {imported[1]}" if imported else ""),
        cwd=folder,
        env={
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": str(folder),
            # mmengine 0.10 loads its own checkpoints with code.
            "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1",
        },
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


SEGFORMER = """
import transformers
config = transformers.SegformerConfig(
    hidden_sizes=[8, 16, 32, 64], depths=[1, 1, 1, 1], num_attention_heads=[1, 2, 4, 8],
    decoder_hidden_size=32, num_labels=5,
)
"""


def test_transformers_save_and_from_pretrained(tmp_path: Path) -> None:
    load("transformers")
    run(
        tmp_path,
        """
        net = transformers.SegformerForSemanticSegmentation(config)
        first = fullattn.insert(
            net, fullattn.SpatialNonLocal, after="decode_head.linear_fuse",
            sample_input={"pixel_values": x},
        )
        second = fullattn.insert(
            net, fullattn.FullyAttentional, after="decode_head.linear_fuse", project=True,
            sample_input={"pixel_values": x},
        )
        third = fullattn.insert(
            net, fullattn.ChannelNonLocal, after="decode_head.linear_fuse",
            sample_input={"pixel_values": x},
        )
        fullattn.remove(third)
        activate(net)
        check(net, x, first)
        net.save_pretrained("saved")
        """,
        SEGFORMER,
    )
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())["fullattn"]
    assert [change["insert"] for change in saved] == ["SpatialNonLocal", "FullyAttentional"]
    run(
        tmp_path,
        """
        from fullattn.integrations import transformers as integration
        integration.register()
        integration.register()
        for cls in (transformers.SegformerForSemanticSegmentation,
                    transformers.AutoModelForSemanticSegmentation):
            net, info = cls.from_pretrained("saved", output_loading_info=True)
            assert not info["missing_keys"] and not info["unexpected_keys"], info
            check(net, x)
        path = Path("saved/config.json")
        path.write_text(path.read_text().replace('"modules": ', '"modules": 1'))
        try:
            transformers.SegformerForSemanticSegmentation.from_pretrained("saved")
        except ValueError as error:
            assert "expected the architecture that it was saved from" in str(error), error
        else:
            raise AssertionError("loaded a change of another architecture")
        """,
        SEGFORMER,
    )


UPERNET = """
import transformers
config = transformers.UperNetConfig(
    backbone_config=transformers.ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32, 64, 128], depths=[1, 1, 1, 1], layer_type="basic",
        out_features=["stage1", "stage2", "stage3", "stage4"],
    ),
    hidden_size=32, num_labels=5, auxiliary_in_channels=64, auxiliary_channels=16,
)
"""


def test_what_pretrained_weights_lack_is_initialised_inside_transformers(tmp_path: Path) -> None:
    # from_pretrained builds on the meta device and fills what is missing with empty memory.
    load("transformers")
    (tmp_path / "ours.py").write_text(
        textwrap.dedent("""
        import torch, fullattn, transformers
        from torch import nn
        class Ours(transformers.UperNetForSemanticSegmentation):
            def __init__(self, config):
                super().__init__(config)
                self.extra = fullattn.FullyAttentional(32)
                nested = fullattn.FullyAttentional(16, gamma_init=0.5)
                self.nested = nn.ModuleDict({"layer": nested})
                for layer in (fullattn.SpatialNonLocal, fullattn.ChannelNonLocal,
                              fullattn.FullyAttentional):
                    options = {"project": False} if layer is fullattn.FullyAttentional else {}
                    fullattn.insert(
                        self, layer, after="decode_head.fpn_bottleneck",
                        sample_input={"pixel_values": torch.zeros(1, 3, 64, 64)}, **options,
                    )
                self.post_init()
        """)
    )
    run(
        tmp_path,
        """
        net = transformers.UperNetForSemanticSegmentation(config)
        check(net, x, True)
        net.save_pretrained("saved")
        import ours
        # Memory that was used before, so that empty memory is not zero by chance.
        junk = [torch.full((size,), 3e16) for size in (1, 32, 1024, 9216) for _ in range(500)]
        del junk
        net, info = ours.Ours.from_pretrained("saved", output_loading_info=True)
        assert info["missing_keys"] and not info["unexpected_keys"], info
        check(net, x)  # every layer starts as the identity
        head = net.decode_head.fpn_bottleneck
        gammas = [layer.gamma.item() for layer in (
            head.fully_attentional, head.channel_non_local, net.extra, net.nested["layer"])]
        assert gammas == [0, 0, 0, 0.5], gammas
        fresh = fullattn.FullyAttentional(32).state_dict()
        for name, value in net.extra.state_dict().items():
            if value.numel() > 1:
                assert abs(value.std() - fresh[name].std()) < 0.03, name
        for seed in (1, 2):
            torch.manual_seed(seed)
            activate(net)
            check(net, x, True)
            net.save_pretrained("again")
            again = ours.Ours.from_pretrained("again")
            check(again, x)  # nothing that was saved is initialised, nothing inserted twice
            assert list(again.state_dict()) == list(net.state_dict())
            net = again
        assert not getattr(net.config, "fullattn", [])
        """,
        UPERNET,
    )


def test_smp_save_and_from_pretrained(tmp_path: Path) -> None:
    load("segmentation_models_pytorch")
    smp = "import segmentation_models_pytorch as smp\n"
    run(
        tmp_path,
        """
        net = smp.Unet("resnet18", encoder_weights=None, classes=5)
        report = fullattn.insert(
            net, fullattn.FullyAttentional, after="encoder.layer4", project=False
        )
        gone = fullattn.insert(net, fullattn.ChannelNonLocal, after="encoder.layer3")
        fullattn.remove(gone)
        fullattn.swap(net, "decoder.blocks.1.attention2", fullattn.SpatialNonLocal, sample_input=x)
        activate(net)
        check(net, x, report)
        net.save_pretrained("saved")
        """,
        smp,
    )
    run(
        tmp_path,
        """
        from fullattn.integrations import segmentation_models_pytorch as integration
        integration.register()
        integration.register()
        net = smp.from_pretrained("saved")
        check(net, x)
        net.save_pretrained("again")
        check(smp.from_pretrained("again"), x)
        check(smp.Unet.from_pretrained("saved"), x)
        """,
        smp,
    )


def test_smp_without_the_integration_does_not_load_silently(tmp_path: Path) -> None:
    smp: Any = load("segmentation_models_pytorch")
    net = smp.Unet("resnet18", encoder_weights=None, classes=5)
    fullattn.insert(net, fullattn.FullyAttentional, after="encoder.layer4", project=False)
    net.save_pretrained(tmp_path / "saved")
    out = run(
        tmp_path,
        """
        try:
            smp.from_pretrained("saved")
        except RuntimeError as error:
            print(error)
        """,
        "import segmentation_models_pytorch as smp\n",
    )
    assert "encoder.layer4.fully_attentional" in out


MMENGINE = """
from mmengine.model import BaseModel
from mmengine.registry import MODELS
from mmengine.runner import Runner
from fullattn.integrations import mmengine as integration
integration.register()
integration.register()

@MODELS.register_module()
class Net(BaseModel):
    def __init__(self, channels, train_cfg=None):
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1)
        self.head = nn.Conv2d(channels, 5, 1)
    def forward(self, inputs, data_samples=None, mode="tensor"):
        y = self.head(self.stem(inputs))
        return {"loss": y.square().mean()} if mode == "loss" else y

class Data(torch.utils.data.Dataset):
    def __len__(self): return 4
    def __getitem__(self, i): return {"inputs": x[i % 2]}

network = dict(type="Net", channels=8)
changed = dict(type="Changed", model=network, changes="change.json")

def runner(folder, model, **options):
    return Runner(
        model, work_dir=folder, log_level="ERROR", experiment_name=folder,
        train_dataloader=dict(
            batch_size=2, dataset=Data(), sampler=dict(type="DefaultSampler", shuffle=False),
            collate_fn=dict(type="default_collate"),
        ),
        optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.1)),
        train_cfg=dict(by_epoch=True, max_epochs=2), **options,
    )
"""


def test_the_runner_of_mmengine_builds_trains_and_loads(tmp_path: Path) -> None:
    load("mmcv")
    run(
        tmp_path,
        """
        net = MODELS.build(network)
        report = fullattn.insert(net, fullattn.FullyAttentional, after="stem", gamma_init=0.5)
        report.save("change.json")
        made = runner("first", changed)
        layer = made.model.stem.fully_attentional
        before = layer.gamma.item()
        made.train()
        assert layer.gamma.item() != before  # the optimiser has it
        check(made.model, x, report)
        """,
        MMENGINE,
    )
    run(
        tmp_path,
        """
        from mmengine.runner import load_checkpoint
        made = runner("second", changed, load_from="first/epoch_2.pth")
        made.load_or_resume()
        check(made.model, x)
        net = MODELS.build({**changed, "train_cfg": None})
        load_checkpoint(net, "first/epoch_2.pth", strict=True)
        check(net, x)
        try:
            MODELS.build({**changed, "model": dict(type="Net", channels=16)})
        except Exception as error:
            assert "expected 'stem' to have 8 channels" in str(error), error
        else:
            raise AssertionError("built")
        """,
        MMENGINE,
    )


LIGHTNING = """
import lightning

class Segmenter(lightning.LightningModule):
    def __init__(self, channels, changes=()):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Conv2d(3, channels, 3, padding=1), nn.Conv2d(channels, 5, 1))
        for change in changes:
            fullattn.replay(self.net, change)
    def forward(self, x): return self.net(x)
    def training_step(self, batch, index): return self(batch).square().mean()
    def configure_optimizers(self): return torch.optim.SGD(self.parameters(), lr=0.1)
"""


def test_lightning_load_from_checkpoint(tmp_path: Path) -> None:
    ensure = load("torchvision")
    assert ensure is not None
    pytest.importorskip("lightning", reason="lightning is not installed")
    run(
        tmp_path,
        """
        plain = Segmenter(8)
        report = fullattn.insert(
            plain.net, fullattn.FullyAttentional, after="0", project=False, gamma_init=0.5
        )
        module = Segmenter(8, changes=[report.to_dict()])
        trainer = lightning.Trainer(
            max_steps=2, logger=False, enable_progress_bar=False, enable_model_summary=False,
            accelerator="cpu", enable_checkpointing=False,
        )
        trainer.fit(module, torch.utils.data.DataLoader(x, batch_size=1))
        trainer.save_checkpoint("net.ckpt")
        check(module, x, report)
        """,
        LIGHTNING,
    )
    run(tmp_path, 'check(Segmenter.load_from_checkpoint("net.ckpt"), x)', LIGHTNING)


def test_torch_hub_load(tmp_path: Path) -> None:
    (tmp_path / "hubconf.py").write_text(
        textwrap.dedent("""
        dependencies = ["torch", "fullattn"]
        from pathlib import Path
        import fullattn, torch
        from torch import nn
        here = Path(__file__).parent
        def base():
            return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 5, 1))
        def net(pretrained=True):
            model = base()
            fullattn.replay(model, here / "change.json")
            if pretrained:
                model.load_state_dict(torch.load(here / "net.pt"))
            return model
        """)
    )
    run(
        tmp_path,
        """
        model = torch.hub.load(".", "base", source="local")
        report = fullattn.insert(model, fullattn.FullyAttentional, after="0", project=False)
        activate(model)
        report.save("change.json")
        torch.save(model.state_dict(), "net.pt")
        check(model, x, report)
        """,
    )
    run(tmp_path, 'check(torch.hub.load(".", "net", source="local"), x)')


def test_to_empty_and_reset_parameters_initialise_every_layer() -> None:
    for layer, options in (
        (fullattn.FullyAttentional, {}),
        (fullattn.ChannelNonLocal, {}),
        (fullattn.SpatialNonLocal, {}),
    ):
        with torch.device("meta"):
            model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Tanh())
        fullattn.insert(model, layer, after="0", **options)
        model.to_empty(device="cpu")
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                tensor.fill_(3 if not tensor.is_floating_point() else float("nan"))
        for module in model.modules():  # as FSDP2's recipe does
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        assert model(torch.randn(2, 3, 4, 5)).isfinite().all()
        assert all(x.isfinite().all() for x in model.state_dict().values())
