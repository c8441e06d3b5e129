"""Loads an exported folder with transformers, in a process of its own: its modules are cached under HF_HOME."""

import sys
import warnings

warnings.simplefilter("ignore")


def main(folder, saved_again):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    inputs = torch.load(f"{folder}/../inputs.pt", weights_only=True)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    with torch.no_grad():
        found = {
            "logits": model(ids).logits,
            "masked": model(input_ids=ids, attention_mask=mask).logits,
            "loss": model(ids, labels=ids).loss,
            "generated": model.generate(ids, max_new_tokens=6, do_sample=False),
            "beams": model.generate(ids, max_new_tokens=4, num_beams=3, do_sample=False),
        }
    model.save_pretrained(saved_again)
    again = AutoModelForCausalLM.from_pretrained(saved_again, trust_remote_code=True, dtype=torch.bfloat16)
    with torch.no_grad():
        found["again"] = again(ids).logits
    fresh = AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(folder, trust_remote_code=True), trust_remote_code=True
    )
    found |= {
        "tied": model.get_output_embeddings().weight is model.get_input_embeddings().weight,
        "vocabulary": model.config.vocab_size,
        "parameters": model.num_parameters(),
        "fresh": fresh.state_dict()["model.blocks.0.feed_forward.first.weight"],
    }
    torch.save(found, f"{folder}/../outputs.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
