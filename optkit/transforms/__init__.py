"""All transforms. A new one is one file and one line in ``TRANSFORMS``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from optkit.core.registry import Registry
from optkit.core.subject import Calibration
from optkit.transforms.contract import Plan, Stage, Transform, name_of

if TYPE_CHECKING:
    from optkit.transforms.distill.distill import Distill as Distill
    from optkit.transforms.dtype import Dtype as Dtype
    from optkit.transforms.factorize.low_rank import LowRank as LowRank
    from optkit.transforms.merge.ensemble import Ensemble as Ensemble
    from optkit.transforms.merge.merge import Merge as Merge
    from optkit.transforms.parallel.data_parallel import DataParallel as DataParallel
    from optkit.transforms.parallel.pipeline_parallel import PipelineParallel as PipelineParallel
    from optkit.transforms.parallel.tensor_parallel import TensorParallel as TensorParallel
    from optkit.transforms.prune.drop_layers import DropLayers as DropLayers
    from optkit.transforms.prune.magnitude import Magnitude as Magnitude
    from optkit.transforms.prune.prune_channels import PruneChannels as PruneChannels
    from optkit.transforms.prune.prune_ffn import PruneFfn as PruneFfn
    from optkit.transforms.prune.prune_heads import PruneHeads as PruneHeads
    from optkit.transforms.prune.prune_hidden import PruneHidden as PruneHidden
    from optkit.transforms.prune.sparse import Sparse as Sparse
    from optkit.transforms.prune.sparsegpt import Sparsegpt as Sparsegpt
    from optkit.transforms.prune.wanda import Wanda as Wanda
    from optkit.transforms.quantize.int4 import Int4 as Int4
    from optkit.transforms.quantize.int8 import Int8 as Int8
    from optkit.transforms.quantize.llm_int8 import LlmInt8 as LlmInt8
    from optkit.transforms.quantize.mixed import Mixed as Mixed
    from optkit.transforms.quantize.nf4 import Nf4 as Nf4
    from optkit.transforms.quantize.qat import Qat as Qat
    from optkit.transforms.quantize.smoothquant import Smoothquant as Smoothquant
    from optkit.transforms.runtime.adaptive import Adaptive as Adaptive
    from optkit.transforms.runtime.bucketing import Bucketing as Bucketing
    from optkit.transforms.runtime.chunked_prefill import ChunkedPrefill as ChunkedPrefill
    from optkit.transforms.runtime.compile import Compile as Compile
    from optkit.transforms.runtime.draft import Draft as Draft
    from optkit.transforms.runtime.kv_cache import KvCache as KvCache
    from optkit.transforms.runtime.offload import Offload as Offload
    from optkit.transforms.runtime.prefix_cache import PrefixCache as PrefixCache
    from optkit.transforms.runtime.prompt_lookup import PromptLookup as PromptLookup
    from optkit.transforms.runtime.sliding_window import SlidingWindow as SlidingWindow
    from optkit.transforms.runtime.static_cache import StaticCache as StaticCache

TRANSFORMS: Registry[Transform] = Registry(
    "transform",
    {
        "merge": "optkit.transforms.merge.merge:Merge",
        "ensemble": "optkit.transforms.merge.ensemble:Ensemble",
        "magnitude": "optkit.transforms.prune.magnitude:Magnitude",
        "wanda": "optkit.transforms.prune.wanda:Wanda",
        "sparsegpt": "optkit.transforms.prune.sparsegpt:Sparsegpt",
        "drop_layers": "optkit.transforms.prune.drop_layers:DropLayers",
        "prune_channels": "optkit.transforms.prune.prune_channels:PruneChannels",
        "prune_ffn": "optkit.transforms.prune.prune_ffn:PruneFfn",
        "prune_heads": "optkit.transforms.prune.prune_heads:PruneHeads",
        "prune_hidden": "optkit.transforms.prune.prune_hidden:PruneHidden",
        "low_rank": "optkit.transforms.factorize.low_rank:LowRank",
        "distill": "optkit.transforms.distill.distill:Distill",
        "sparse": "optkit.transforms.prune.sparse:Sparse",
        "dtype": "optkit.transforms.dtype:Dtype",
        "int8": "optkit.transforms.quantize.int8:Int8",
        "int4": "optkit.transforms.quantize.int4:Int4",
        "smoothquant": "optkit.transforms.quantize.smoothquant:Smoothquant",
        "mixed": "optkit.transforms.quantize.mixed:Mixed",
        "qat": "optkit.transforms.quantize.qat:Qat",
        "nf4": "optkit.transforms.quantize.nf4:Nf4",
        "llm_int8": "optkit.transforms.quantize.llm_int8:LlmInt8",
        "compile": "optkit.transforms.runtime.compile:Compile",
        "kv_cache": "optkit.transforms.runtime.kv_cache:KvCache",
        "static_cache": "optkit.transforms.runtime.static_cache:StaticCache",
        "sliding_window": "optkit.transforms.runtime.sliding_window:SlidingWindow",
        "bucketing": "optkit.transforms.runtime.bucketing:Bucketing",
        "chunked_prefill": "optkit.transforms.runtime.chunked_prefill:ChunkedPrefill",
        "prefix_cache": "optkit.transforms.runtime.prefix_cache:PrefixCache",
        "prompt_lookup": "optkit.transforms.runtime.prompt_lookup:PromptLookup",
        "adaptive": "optkit.transforms.runtime.adaptive:Adaptive",
        "draft": "optkit.transforms.runtime.draft:Draft",
        "offload": "optkit.transforms.runtime.offload:Offload",
        "data_parallel": "optkit.transforms.parallel.data_parallel:DataParallel",
        "tensor_parallel": "optkit.transforms.parallel.tensor_parallel:TensorParallel",
        "pipeline_parallel": "optkit.transforms.parallel.pipeline_parallel:PipelineParallel",
    },
)

__all__ = [
    "TRANSFORMS",
    "Adaptive",
    "Bucketing",
    "Calibration",
    "ChunkedPrefill",
    "Compile",
    "DataParallel",
    "Distill",
    "Draft",
    "DropLayers",
    "Dtype",
    "Ensemble",
    "Int4",
    "Int8",
    "KvCache",
    "LlmInt8",
    "LowRank",
    "Magnitude",
    "Merge",
    "Mixed",
    "Nf4",
    "Offload",
    "PipelineParallel",
    "Plan",
    "PrefixCache",
    "PromptLookup",
    "PruneChannels",
    "PruneFfn",
    "PruneHeads",
    "PruneHidden",
    "Qat",
    "SlidingWindow",
    "Smoothquant",
    "Sparse",
    "Sparsegpt",
    "Stage",
    "StaticCache",
    "TensorParallel",
    "Transform",
    "Wanda",
]


def __getattr__(name: str) -> Any:
    word = name_of(type(name, (), {}))
    if word in TRANSFORMS:
        return TRANSFORMS[word]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
