"Learn, train and use token-based text-to-image models"
from importlib import import_module

__version__ = "0.1.0"

_modules = {
    "core": ["T2IError"],
    "training": ["train"],
    "tokenizers.vqgan": ["VQGAN", "VQGANConfig"],
    "tokenizers.vit_vqgan": ["ViTVQGAN", "ViTVQGANConfig"],
    "tokenizers.multiscale": ["MultiScaleVQVAE", "MultiScaleVQVAEConfig"],
    "tokenizers.soft_codes": ["GumbelVQGAN", "GumbelVQGANConfig"],
    "guidance.clip": ["CLIP", "load_clip"],
    "guidance.vqgan_clip": ["VQGANCLIP", "VQGANCLIPConfig"],
    "generators.var": ["VAR", "VARConfig"],
    "generators.text_var": ["TextVAR", "TextVARConfig"],
    "generators.clip_var": ["AddedTextVAR", "AddedTextVARConfig"],
    "generators.parti": ["Parti", "PartiConfig"],
    "generators.masked_var": ["MaskedTextVAR", "MaskedTextVARConfig"],
    "generators.super_resolution": ["SuperResolution", "SuperResolutionConfig"],
    "control.boxes": ["BoxedVAR", "BoxConfig"],
    "saved": ["load"],
    "catalog": ["list_models"],
    "playground": ["explore_codes", "play_scales", "guidance_sliders", "adapter_sliders",
                   "prompt_box"],
    "words_and_places": ["word_attention"],
}
_module_of = {name: module for module, names in _modules.items() for name in names}
__all__ = [*_module_of, "__version__"]


def __getattr__(name):
    "Import a public name where it is first used: `import t2i` and `t2i --help` stay quick"
    if name in _module_of:
        return getattr(import_module(f"t2i.{_module_of[name]}"), name)
    raise AttributeError(f"module 't2i' has no attribute {name!r}")


def __dir__():
    return sorted(__all__)
