"""Hostile files: each would run a command, or is read from outside of its folder, if a reader let it.

`CASES[name](folder)` writes the files of a case into a folder, and returns the words of the command that reads them.  A
payload that runs writes the file `ran` there.
"""

import json
import os
import pickle
import shutil
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed.checkpoint as dcp

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = f"--config={ROOT}/configs/quickstart.yaml"
CONFIG = {
    "pattern": {"branches": [{"segment_length": 8, "dilation_rate": 1, "is_causal": True}]},
    **{"vocab_size": 256, "dim": 16, "layers": 1, "heads": 2},
}
SMALL = [
    *("--trainer.devices=1", "--trainer.logger=false", "--trainer.callbacks=null", "--trainer.max_steps=1"),
    *("--trainer.enable_progress_bar=false", "--trainer.enable_checkpointing=false", "--trainer.limit_val_batches=1"),
    *("--trainer.limit_test_batches=1", "--trainer.limit_predict_batches=1", "--trainer.default_root_dir=."),
    *("--model.config.dim=16", "--model.config.layers=1", "--model.config.heads=2", "--data.tokens=64"),
    *("--data.megabytes=0.05",),
]
STRATEGY = "--trainer.strategy=ring_sequence_parallel_"
SECRET = "the secret"


class Call:
    """Unpickled, it calls a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def ran(folder):
    return folder / "ran"


def system(folder):
    return Call(os.system, f"touch {ran(folder)}")


def code(folder):
    return Call(exec, f"open({str(ran(folder))!r}, 'w')")


def evaluated(folder):
    return Call(eval, f"open({str(ran(folder))!r}, 'w')")


def spawned(folder):
    import subprocess

    return Call(subprocess.call, ["touch", str(ran(folder))])


def removed(folder):
    """A function of the standard library that no list of suspicious ones names."""
    return Call(shutil.copyfile, str(ROOT / "LICENSE"), str(ran(folder)))


def ours(folder):
    """A function of the package itself, which writes a file."""
    from lightning_longnet.data.tokenizing import _write

    return Call(_write, ran(folder), b"")


PICKLED = [system, code, evaluated, spawned, removed, ours]


def dotted(folder):
    """The pickle of a call by a dotted name below a module that a list may hold: metadata.os.system."""
    command = f"touch {ran(folder)}".encode()
    return (
        b"\x80\x04"
        + _text(b"torch.distributed.checkpoint.metadata")
        + _text(b"os.system")
        + b"\x93"
        + _text(command)
        + b"\x85R."
    )


def _text(raw):
    return b"\x8c" + bytes([len(raw)]) + raw


def oldest(folder):
    """A pickle of protocol 0, with the instruction INST."""
    return f"(S'touch {ran(folder)}'\nios\nsystem\n.".encode()


def evil_module(folder):
    """A module on the path of Python, which runs when it is imported."""
    (folder / "evil_module.py").write_text(
        f"import torch\nopen({str(ran(folder))!r}, 'w')\nclass Attention(torch.nn.Module):\n"
        f"    def __init__(self, *a, **k): super().__init__(); self.w = torch.nn.Linear(1, 1)\n"
        f"    def forward(self, x, **k): return x\n"
    )
    return {"class_path": "evil_module.Attention", "init_args": {}}


# Checkpoints


def plain(**others):
    """The content of a checkpoint of a LongNetModule, as Lightning saves it."""
    torch.manual_seed(0)
    from lightning_longnet import LongNet, LongNetConfig

    model = LongNet(LongNetConfig(**CONFIG))
    return {
        "state_dict": {f"model.{name}": x for name, x in model.state_dict().items()},
        "hyper_parameters": {"config": model.config.to_dict()},
        "pytorch-lightning_version": "2.6.6",
        **{"epoch": 0, "global_step": 0, "loops": {}, "callbacks": {}, "optimizer_states": [], "lr_schedulers": []},
        **others,
    }


def one_file(folder, payload=None, *, zipped=True, **others):
    content = plain(**others)
    if payload is not None:
        content["evil"] = payload(folder)
    path = folder / "a.ckpt"
    if zipped:
        torch.save(content, path)
    else:
        torch.save(content, path, _use_new_zipfile_serialization=False)
    return path


def raw_file(folder, content):
    path = folder / "a.ckpt"
    path.write_bytes(content(folder))
    return path


def forged(folder, payload):
    """A zipped checkpoint whose pickle is replaced."""
    path = one_file(folder)
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, payload(folder) if name.endswith("data.pkl") else content)
    return path


def sharded(folder, metadata=None, meta=None, item=None, outside=False, linked=False):
    """A folder as FSDP2 writes it, with a payload in its `.metadata`, its `meta.pt`, or in a value of its shards."""
    path, content = folder / "a.ckpt", plain()
    state = {"state_dict": content.pop("state_dict")}
    if item is not None:
        names = list(state["state_dict"])
        zeros = {name: torch.zeros_like(x) for name, x in state["state_dict"].items()}
        moments = {name: {"step": torch.tensor(1.0), "exp_avg": x, "exp_avg_sq": x} for name, x in zeros.items()}
        settings = dict.fromkeys(
            ("amsgrad", "maximize", "capturable", "differentiable", "decoupled_weight_decay"), False
        )
        settings |= {"lr": item(folder), "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "initial_lr": 1e-3}
        groups = [{"params": names, **settings, "foreach": None, "fused": None} for _ in range(2)]
        state["optimizer_0"] = {"state": moments, "param_groups": groups}
    dcp.save(state, checkpoint_id=path, no_dist=True)
    if metadata is not None:
        (path / ".metadata").write_bytes(metadata(folder))
    if outside:
        result = pickle.loads((path / ".metadata").read_bytes())
        for info in result.storage_data.values():
            info.relative_path = f"../{info.relative_path}" if outside == "up" else str(folder / info.relative_path)
        (path / ".metadata").write_bytes(pickle.dumps(result))
    if outside or linked:
        for file in path.glob("*.distcp"):
            file.rename(folder / file.name)
            if linked:
                file.symlink_to(folder / file.name)
    torch.save({**content, **({} if meta is None else {"evil": meta(folder)})}, path / "meta.pt")
    return path


def pickled(payload, folder):
    return pickle.dumps(payload(folder))


def deepspeed(folder, model=None, optim=None, tag=None, name=None):
    """A folder as DeepSpeed's stage 2 writes it for one rank, as far as a reader comes."""
    path = folder / "a.ckpt"
    (path / "checkpoint").mkdir(parents=True)
    content = plain()
    module = content.pop("state_dict")
    shapes = {key: x.shape for key, x in module.items()}
    states = {**content, "module": module, "buffer_names": [], "param_shapes": [shapes], "shared_params": {}}
    if name is not None:
        states["module"] = {name(folder): torch.zeros(1)}
    if model is not None:
        states["evil"] = model(folder)
    torch.save(states, path / "checkpoint/mp_rank_00_model_states.pt")
    flat = torch.cat([x.flatten() for x in module.values()])
    inner = {"zero_stage": 2, "partition_count": 1, "single_partition_of_fp32_groups": [flat]}
    if optim is not None:
        inner["evil"] = optim(folder)
    optim_file = "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    torch.save({"optimizer_state_dict": inner, "ds_version": "0.19.8"}, path / "checkpoint" / optim_file)
    (path / "latest").write_text("checkpoint")
    if tag is not None:
        (path / "checkpoint").rename(folder / "elsewhere")
        (path / "latest").write_text(tag(folder))
        (path / "checkpoint").mkdir()
        shutil.copyfile(folder / "elsewhere" / optim_file, path / "checkpoint" / optim_file)
    return path


def generate(make, folder):
    return ["generate", str(make(folder)), "--tokens=1"]


def export(make, folder):
    return ["export", str(make(folder)), str(folder / "out")]


def trained(command, sharding, make, folder):
    return [command, QUICKSTART, *SMALL, f"{STRATEGY}{sharding}", f"--ckpt_path={make(folder)}"]


def stock(strategy, make, folder):
    return ["fit", QUICKSTART, *SMALL, f"--trainer.strategy={strategy}", f"--ckpt_path={make(folder)}"]


def weights(make, folder):
    return ["fit", QUICKSTART, *SMALL, f"{STRATEGY}ddp", f"--model.weights={make(folder)}"]


def convert(make, folder):
    return ["convert", str(make(folder)), str(folder / "out.ckpt"), "--set", "decoder_attention_heads=2"]


# Exported folders, tokenizers


def exported(folder):
    from lightning_longnet import LongNet, LongNetConfig, export_model

    export_model(LongNet(LongNetConfig(**CONFIG)), folder / "model")
    path = folder / "model/config.json"
    values = json.loads(path.read_text())
    values["longnet"]["attention"] = evil_module(folder)
    path.write_text(json.dumps(values))
    return folder / "model"


def evil_tokenizer(folder):
    place = folder / "tokenizer"
    place.mkdir()
    (place / "evil_code.py").write_text(f"open({str(ran(folder))!r}, 'w')\nclass Evil: pass\n")
    auto = {"AutoTokenizer": ["evil_code.Evil", None]}
    (place / "tokenizer_config.json").write_text(json.dumps({"auto_map": auto, "tokenizer_class": "Evil"}))
    (place / "config.json").write_text(json.dumps({"model_type": "evil", "auto_map": {"AutoConfig": "evil_code.Evil"}}))
    return place


# Tokens


def tokens(folder, **changes):
    """A folder of `longnet tokenize` with a shard of tokens outside of it, and changes of its tokens.json."""
    place = folder / "tokens"
    place.mkdir()
    np.save(folder / "outside.npy", np.arange(4000, dtype=np.uint8) % 200)
    np.save(place / "tokens-00000.npy", np.arange(4000, dtype=np.uint8) % 200)
    np.save(place / "documents-00000.npy", np.zeros(1, np.int64))
    description = {"vocab_size": 256, "shards": ["tokens-00000.npy"], "tokenizer": "bytes", "bytes_per_token": 1.0}
    (place / "tokens.json").write_text(json.dumps(description | changes))
    return place


def fit_tokens(change, folder):
    place = change(folder)
    small = [word for word in SMALL if not word.startswith(("--data", "--model"))]
    return ["fit", *small, f"{STRATEGY}ddp", "--trainer.accelerator=cpu", *_model(folder), _token_data(folder, place)]


def _model(folder):
    path = folder / "model.yaml"
    path.write_text(json.dumps({"model": {"config": CONFIG}}))
    return [f"--config={path}"]


def _token_data(folder, place):
    path = folder / "data.yaml"
    init = {"path": str(place), "tokens": 64, "packed": True}  # so that documents are read, too
    path.write_text(json.dumps({"data": {"class_path": "lightning_longnet.TokenFileData", "init_args": init}}))
    return f"--config={path}"


def linked_shard(folder):
    place = tokens(folder)
    (place / "tokens-00000.npy").unlink()
    (place / "tokens-00000.npy").symlink_to(folder / "outside.npy")
    return place


def linked_documents(folder):
    place = tokens(folder)
    np.save(folder / "others.npy", np.zeros(1, np.int64))
    (place / "documents-00000.npy").unlink()
    (place / "documents-00000.npy").symlink_to(folder / "others.npy")
    return place


def linked_description(folder):
    place = tokens(folder)
    (place / "tokens.json").rename(folder / "tokens.json")
    (place / "tokens.json").symlink_to(folder / "tokens.json")
    return place


def objects(name, folder):
    """An array of objects, which is a pickle."""
    place = tokens(folder)
    np.save(place / name, np.array([system(folder)], dtype=object), allow_pickle=True)
    return place


def bare_pickle(name, folder):
    place = tokens(folder)
    (place / name).write_bytes(pickled(system, folder))
    return place


# Images


def images(folder, change):
    from PIL import Image

    for name in ("a", "b"):
        (folder / "images" / name).mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (8, 8), (i, 0, 0)).save(folder / f"images/{name}/{i}.png")
    (folder / "outside").mkdir()
    Image.new("RGB", (8, 8)).save(folder / "outside/x.png")
    change(folder)
    path = folder / "images.yaml"
    config = {**CONFIG, "classes": 2, "image_size": 8, "patch_size": 4}
    del config["vocab_size"]
    config["pattern"] = {"branches": [{"segment_length": 4, "dilation_rate": 1}]}
    model = {"class_path": "lightning_longnet.LongViTModule", "init_args": {"config": config}}
    init = {"path": str(folder / "images"), "size": 8, "validation_share": 0.3}
    data = {"class_path": "lightning_longnet.ImageFolderData", "init_args": init}
    path.write_text(json.dumps({"model": model, "data": data}))
    small = [word for word in SMALL if not word.startswith(("--data", "--model"))]
    return ["fit", *small, f"{STRATEGY}ddp", "--trainer.accelerator=cpu", f"--config={path}"]


def linked_image(folder):
    (folder / "images/a/9.png").symlink_to(folder / "outside/x.png")


def linked_class(folder):
    (folder / "images/c").symlink_to(folder / "outside", target_is_directory=True)


def postscript(folder):
    text = f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n(%pipe%touch {ran(folder)}) (w) file\nshowpage\n"
    for file in (folder / "images").rglob("*.png"):
        file.write_text(text)


def pickled_image(folder):
    for file in (folder / "images").rglob("*.png"):
        file.write_bytes(pickled(system, folder))


# Runs and configurations


def run_folder(folder, name, text):
    place = folder / "run"
    place.mkdir()
    (place / "metrics.csv").write_text("step,train/loss\n1,2.0\n2,1.0\n")
    if name is not None:
        (place / name).write_text(text(folder))
    return ["report", str(place), "--no-images"]


def linked_run(folder, name):
    words = run_folder(folder, None, None)
    (folder / "secret").write_text(
        f"step,train/loss,{SECRET}\n1,2.0,3.0\n" if "csv" in name else f'{{"a": "{SECRET}"}}'
    )
    (folder / "run" / name).unlink(missing_ok=True)
    (folder / "run" / name).symlink_to(folder / "secret")
    return words


def tagged(folder):
    return f"model: !!python/object/apply:os.system ['touch {ran(folder)}']\n"


def script(folder):
    return json.dumps({"device": "<script>alert(1)</script>", "started": "<script>alert(2)</script>"})


def configured(command, folder):
    (folder / "evil.yaml").write_text(tagged(folder))
    return [command, QUICKSTART, f"--config={folder / 'evil.yaml'}"]


def saved_dataset(folder, change):
    """A folder that `save_to_disk` of datasets wrote, whose files are elsewhere."""
    import datasets

    place = folder / "dataset"
    datasets.Dataset.from_dict({"text": ["some text " * 40] * 20}).save_to_disk(place)
    state = json.loads((place / "state.json").read_text())
    (file,) = [each["filename"] for each in state["_data_files"]]
    (place / file).rename(folder / file)
    if change == "link":
        (place / file).symlink_to(folder / file)
    else:
        state["_data_files"] = [{"filename": f"../{file}" if change == "up" else str(folder / file)}]
        (place / "state.json").write_text(json.dumps(state))
    path = folder / "data.yaml"
    init = {"path": str(place), "tokens": 64}
    path.write_text(json.dumps({"data": {"class_path": "lightning_longnet.HubData", "init_args": init}}))
    small = [word for word in SMALL if not word.startswith(("--data", "--model"))]
    return ["fit", *small, f"{STRATEGY}ddp", "--trainer.accelerator=cpu", *_model(folder), f"--config={path}"]


def hyper(folder, **values):
    from lightning_longnet import LongNetConfig

    config = {**LongNetConfig(**CONFIG).to_dict(), "attention": values.get("attention")}
    others = {name: value for name, value in values.items() if name != "attention"}
    return one_file(folder, hyper_parameters={"config": config, **others})


def named_class(folder):
    return hyper(folder, attention=evil_module(folder))


def named_tokenizer(folder):
    return hyper(folder, tokenizer=str(evil_tokenizer(folder)))


def instantiated(folder):
    evil_module(folder)
    return hyper(folder, _instantiator="evil_module.Attention", _class_path="evil_module.Attention")


def sharded_as(folder, attention):
    path = sharded(folder)
    content = torch.load(path / "meta.pt", weights_only=True)
    content["hyper_parameters"]["config"]["attention"] = attention
    torch.save(content, path / "meta.pt")
    return path


CASES = {
    **{f"file, {p.__name__}: generate": partial(generate, partial(one_file, payload=p)) for p in PICKLED},
    "file of old torch: generate": partial(generate, partial(one_file, payload=system, zipped=False)),
    "file of protocol 0: export": partial(export, partial(raw_file, content=oldest)),
    "file, dotted name: generate": partial(generate, partial(raw_file, content=dotted)),
    "file, forged pickle: export": partial(export, partial(forged, payload=dotted)),
    "file: convert": partial(convert, partial(one_file, payload=system)),
    "file of protocol 0: convert": partial(convert, partial(raw_file, content=oldest)),
    "file: model.weights": partial(weights, partial(one_file, payload=code)),
    **{
        f"file: {command}": partial(trained, command, "ddp", partial(one_file, payload=system))
        for command in ("fit", "validate", "test", "predict")
    },
    "file: fit, fsdp2": partial(trained, "fit", "fsdp2", partial(one_file, payload=system)),
    "file of old torch: fit": partial(trained, "fit", "ddp", partial(one_file, payload=system, zipped=False)),
    "file: fit, Lightning's ddp": partial(stock, "ddp", partial(one_file, payload=system)),
    **{
        f".metadata, {p.__name__}: generate": partial(generate, partial(sharded, metadata=partial(pickled, p)))
        for p in PICKLED
    },
    ".metadata, dotted name: generate": partial(generate, partial(sharded, metadata=dotted)),
    ".metadata of protocol 0: export": partial(export, partial(sharded, metadata=oldest)),
    ".metadata: model.weights": partial(weights, partial(sharded, metadata=partial(pickled, system))),
    **{
        f".metadata: {command}": partial(trained, command, "fsdp2", partial(sharded, metadata=partial(pickled, system)))
        for command in ("fit", "validate", "test", "predict")
    },
    ".metadata: fit, Lightning's": partial(
        stock,
        '{"class_path": "lightning.pytorch.strategies.ModelParallelStrategy"}',
        partial(sharded, metadata=partial(pickled, system)),
    ),
    "meta.pt: generate": partial(generate, partial(sharded, meta=system)),
    "meta.pt: fit": partial(trained, "fit", "fsdp2", partial(sharded, meta=system)),
    "value of a shard: fit": partial(trained, "fit", "fsdp2", partial(sharded, item=system)),
    "shard above the folder: generate": partial(generate, partial(sharded, outside="up")),
    "shard by an absolute path: generate": partial(generate, partial(sharded, outside="absolute")),
    "shard above the folder: fit": partial(trained, "fit", "fsdp2", partial(sharded, outside="up")),
    "shard by a link: generate": partial(generate, partial(sharded, linked=True)),
    "DeepSpeed's model: generate": partial(generate, partial(deepspeed, model=system)),
    "DeepSpeed's model: export": partial(export, partial(deepspeed, model=code)),
    "DeepSpeed's model: model.weights": partial(weights, partial(deepspeed, model=system)),
    "DeepSpeed's states: generate": partial(generate, partial(deepspeed, optim=system)),
    **{
        f"DeepSpeed's model: {command}": partial(
            trained, command, "deepspeed_stage_2", partial(deepspeed, model=system)
        )
        for command in ("fit", "validate", "test", "predict")
    },
    "DeepSpeed's states: fit": partial(trained, "fit", "deepspeed_stage_2", partial(deepspeed, optim=system)),
    "DeepSpeed's tag: fit": partial(
        trained, "fit", "deepspeed_stage_2", partial(deepspeed, tag=lambda _: "../elsewhere")
    ),
    "DeepSpeed's name: fit": partial(
        trained, "fit", "deepspeed_stage_2", partial(deepspeed, name=lambda folder: str(ran(folder)))
    ),
    "DeepSpeed: fit, Lightning's": partial(stock, "deepspeed", partial(deepspeed, model=system)),
    "class: generate": partial(generate, named_class),
    "class: export": partial(export, named_class),
    "class: model.weights": partial(weights, named_class),
    "class in a folder: generate": partial(generate, lambda f: sharded_as(f, evil_module(f))),
    "class in an exported folder: generate": partial(generate, exported),
    "tokenizer of a checkpoint: generate": partial(generate, named_tokenizer),
    "tokenizer of tokens.json: fit": partial(fit_tokens, lambda f: tokens(f, tokenizer=str(evil_tokenizer(f)))),
    "shard above tokens.json: fit": partial(fit_tokens, lambda f: tokens(f, shards=["../outside.npy"])),
    "shard by an absolute path: fit": partial(fit_tokens, lambda f: tokens(f, shards=[str(f / "outside.npy")])),
    "shard by a link: fit": partial(fit_tokens, linked_shard),
    "documents by a link: fit": partial(fit_tokens, linked_documents),
    "tokens.json by a link: fit": partial(fit_tokens, linked_description),
    "objects as tokens: fit": partial(fit_tokens, partial(objects, "tokens-00000.npy")),
    "objects as documents: fit": partial(fit_tokens, partial(objects, "documents-00000.npy")),
    "pickle as tokens: fit": partial(fit_tokens, partial(bare_pickle, "tokens-00000.npy")),
    "image by a link: fit": partial(images, change=linked_image),
    "class of images by a link: fit": partial(images, change=linked_class),
    "PostScript as an image: fit": partial(images, change=postscript),
    "pickle as an image: fit": partial(images, change=pickled_image),
    "tag in config.yaml: report": partial(run_folder, name="config.yaml", text=tagged),
    "tag in hparams.yaml: report": partial(run_folder, name="hparams.yaml", text=tagged),
    "script in run.json: report": partial(run_folder, name="run.json", text=script),
    "metrics by a link: report": partial(linked_run, name="metrics.csv"),
    "record by a link: report": partial(linked_run, name="run.json"),
    "tag in a configuration: fit": partial(configured, "fit"),
    "tag in a configuration: plan": partial(configured, "plan"),
    "dataset above its folder: fit": partial(saved_dataset, change="up"),
    "dataset by an absolute path: fit": partial(saved_dataset, change="absolute"),
    "dataset by a link: fit": partial(saved_dataset, change="link"),
}

# what a reader may read to its end, as nothing in it runs
HARMLESS = {
    "tag in config.yaml: report",
    "tag in hparams.yaml: report",
    "script in run.json: report",
    "tokenizer of tokens.json: fit",
}
# one of each format, for the quick tests
QUICK = [
    "file, system: generate",
    "file: convert",
    ".metadata, system: generate",
    "meta.pt: generate",
    "shard above the folder: generate",
    "class: generate",
    "class in an exported folder: generate",
    "tag in config.yaml: report",
    "metrics by a link: report",
]
