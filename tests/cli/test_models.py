"""The command line trains modules other than LongNetModule, whose arguments may have the names of that one's."""

import sys

import pytest
import yaml

from lightning_longnet.cli import main

IMAGES = {
    "class_path": "LongViTModule",
    "init_args": {"config": {"pattern": {"branches": [{"segment_length": 16}]}, "classes": 3, "final_norm_eps": 1e-6}},
}


@pytest.mark.parametrize("through", ["file", "words"])
def test_a_module_of_images_is_configured_without_what_is_of_tokens(through, tmp_path, capsys, monkeypatch):
    if through == "file":
        (tmp_path / "images.yaml").write_text(yaml.safe_dump({"model": IMAGES}))
        words = [f"--config={tmp_path}/images.yaml"]
    else:
        config = "--model.config"
        words = ["--model=LongViTModule", f'{config}.pattern={{"branches": [{{"segment_length": 16}}]}}']
        words += [f"{config}.classes=3", f"{config}.final_norm_eps=1e-6"]
    words += ["--data=lightning_longnet.data.ImageFolderData", "--data.path=x", "--print_config"]
    monkeypatch.setattr(sys, "argv", ["longnet", "fit", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    result = yaml.safe_load(capsys.readouterr().out)["model"]
    assert result["class_path"] == "lightning_longnet.LongViTModule"
    config = result["init_args"]["config"]
    assert (config["classes"], float(config["final_norm_eps"])) == (3, 1e-6)
    assert "vocab_size" not in config
