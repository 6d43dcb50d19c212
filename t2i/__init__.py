"Learn, train and use token-based text-to-image models"
from importlib import import_module

__version__ = "0.1.0"

_public = dict(load="pipeline", list_models="pipeline", T2IError="core", train="training",
               MultiScaleVQVAE="multiscale", VQGAN="vqgan", GumbelVQGAN="vqgan", ViTVQGAN="vit_vqgan", VAR="var", TextVAR="text_var", VQGANCLIP="vqgan_clip")
__all__ = [*_public, "__version__"]


def __getattr__(name):
    "Import a public name where it is first used, so that `import t2i` and `t2i --help` are quick"
    if name in _public: return getattr(import_module(f"t2i.{_public[name]}"), name)
    raise AttributeError(f"module 't2i' has no attribute {name!r}")


def __dir__(): return sorted(__all__)
