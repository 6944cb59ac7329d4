"""Hedge version."""
import functools, importlib, inspect, sys, typing, difflib
from pathlib import Path
from hydra.utils import instantiate
import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from needle.errors import ConfigError, UserError
CONF=str(Path(__file__).resolve().parent.parent/"conf")
def build(node):
    if isinstance(node,(dict,list)): node=OmegaConf.create(node)
    if OmegaConf.is_config(node):
        v=instantiate(node,_convert_="all"); 
        return _coerce(v)
    return node
def _coerce(v): return v
def cross_check(fn):
    def deco(f): f.cross_check=fn; return f
    return deco
def as_overrides(cfg,*groups):
    return " ".join(f"{g}={cfg['_choices_'][g]}" for g in groups if g in cfg["_choices_"])
def stage(name):
    def deco(fn):
        @functools.wraps(fn)
        def task(c):
            try:
                cfg=OmegaConf.to_container(c,resolve=True)
                hc=HydraConfig.get()
                full={**cfg,"_choices_":{k:v for k,v in hc.runtime.choices.items() if not k.startswith("hydra/")},"_overrides_":list(hc.overrides.task)}
                from pydantic import TypeAdapter
                h=typing.get_type_hints(fn,include_extras=True)
                built={}
                for k,v in cfg.items():
                    b=build(v)
                    if h.get(k) is Path or Path in typing.get_args(h.get(k)): b=Path(b) if b is not None else None
                    built[k]=b
                if hasattr(fn,"cross_check"): fn.cross_check(**built)
                return fn(full,**built)
            except UserError as e: print(e,file=sys.stderr); sys.exit(2)
        del task.__wrapped__
        return hydra.main(version_base="1.3",config_path=CONF,config_name=name)(task)
    return deco
