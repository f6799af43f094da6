"""The profile: every phase is there, its kinds add up, and kernels are told by their names."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest
import torch

from reelflow.evaluation.profile import KINDS, Watch, kind, run, table

tiny = runpy.run_path(str(Path(__file__).parents[1] / "pipelines" / "tiny.py"))


def test_a_clip_is_taken_apart(tmp_path: Path) -> None:
    found = run(str(tiny["write_tiny"](tmp_path / "tiny")), "cpu", frames=5, repeats=1)
    assert json.loads(json.dumps(found)) == found
    phases = {row["phase"]: row for row in found["phases"]}
    assert list(phases) == ["text", "deep", "shallow", "denoiser", "decoder", "writing"]
    for row in phases.values():
        assert sum(row["kinds"].values()) == pytest.approx(row["seconds"])
        assert min(row["kinds"].values()) >= 0
    for name in ("deep", "shallow", "denoiser"):
        assert all(phases[name]["kinds"][part] > 0 for part in ("GEMM", "attention", "elementwise", "host"))
    assert phases["decoder"]["kinds"]["convolution"] > 0
    assert phases["writing"]["kinds"]["host"] > 0.9 * phases["writing"]["seconds"]
    words = table(found).splitlines()
    assert words[1].split() == ["phase", "seconds", "share", *KINDS]
    assert [line.split()[0] for line in words[2:]] == [*phases, "all"]
    assert words[-1].split()[2] == "100.0%"


def test_every_tenth_pass_is_watched() -> None:
    watch = Watch(torch.device("cpu"), every=3)
    sizes = []
    for step in range(8):  # a stretch after every tick; those after tick 0, 3 and 6 are watched
        watch.tick()
        sizes.append(watch.profiler is not None)
        torch.ones(64, 64) @ torch.ones(64, 64) if step < 7 else None
    watch.end()
    assert sizes == [True, False, False, True, False, False, True, False]
    assert (watch.ticks, watch.watched, watch.profiler) == (8, 3, None)
    assert watch.kinds["GEMM"] > 0
    assert sum(watch.result(2.0).values()) == pytest.approx(2.0)


def test_kernels_by_name() -> None:
    expected = {
        "GEMM": ["aten::addmm", "aten::mm", "aten::bmm", "mkldnn::_linear_pointwise", "nvjet_tst_128x64_64x6_1x2_h_bz_TNT",
                 "void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16_32x32_128x2_tn_align8>", "aten::_scaled_mm",
                 "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize64x128x64", "void gemv2T_kernel_val<int, int, float>"],
        "attention": ["aten::_scaled_dot_product_flash_attention_for_cpu", "fmha_cutlassF_bf16_aligned_64x64_rf_sm80",
                      "void pytorch_flash::flash_fwd_splitkv_kernel<Flash_fwd_kernel_traits<64, 64, 256, 4>>",
                      "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob"],
        "convolution": ["aten::mkldnn_convolution", "aten::slow_conv3d_forward", "sm90_xmma_fprop_implicit_gemm_conv"],
        "elementwise": ["aten::add", "aten::gelu", "aten::native_layer_norm", "aten::index_copy_", "aten::copy_", "aten::cat", "aten::mul",
                        "void at::native::vectorized_elementwise_kernel<4, at::native::GeluCUDAKernelImpl>", "aten::topk", "aten::tanh"],
        "host": ["aten::view", "aten::transpose", "aten::t", "aten::to", "aten::item", "aten::empty_like", "aten::reshape"],
    }  # fmt: skip
    assert {name: kind(name) for names in expected.values() for name in names} == {
        name: part for part, names in expected.items() for name in names
    }
