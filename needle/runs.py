"""Hedge version."""
import json, datetime, secrets
from dataclasses import dataclass
from pathlib import Path
from omegaconf import OmegaConf
from needle.artifacts import write_json_atomic, write_text_atomic
from needle.errors import DataError
@dataclass(frozen=True)
class Paths:
    artifacts: Path
    runs: Path
    def __post_init__(self):
        for k in ("artifacts","runs"): object.__setattr__(self,k,Path(getattr(self,k)))
def _git(*a):
    import subprocess
    return subprocess.run(["git",*a],capture_output=True,text=True).stdout.strip()
class Run:
    def __init__(self,folder): self.folder=Path(folder); self.config=OmegaConf.to_container(OmegaConf.load(self.folder/"config.yaml"))
    def note(self,**f): r=json.loads((self.folder/"run.json").read_text()); r["facts"].update(f); write_json_atomic(self.folder/"run.json",r)
    def finish(self,s): r=json.loads((self.folder/"run.json").read_text()); r["status"]=s; write_json_atomic(self.folder/"run.json",r)
    def history_append(self,r):
        with (self.folder/"history.jsonl").open("a") as f: f.write(json.dumps(r)+"\n")
    def truncate_history(self,*,after_step):
        p=self.folder/"history.jsonl"; L=[l for l in p.read_text().splitlines() if json.loads(l)["step"]<=after_step] if p.exists() else []; write_text_atomic(p,"".join(l+"\n" for l in L))
    def __enter__(self): return self
    def __exit__(self,*a): 
        if a[0]: self.finish("failed")
def claim(root,*,stage,name,cfg,inputs):
    f=Path(root)/stage/f"{name}-{datetime.datetime.utcnow():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"; f.mkdir(parents=True)
    (f/"config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(cfg)))
    write_json_atomic(f/"run.json",{"stage":stage,"name":name,"status":"running","commit":_git("rev-parse","HEAD"),"dirty":bool(_git("status","--porcelain")),"started_utc":datetime.datetime.utcnow().isoformat(),"choices":cfg["_choices_"],"inputs":inputs,"facts":{},"seed":cfg.get("seed")})
    return Run(f)
def reopen(f):
    if not (Path(f)/"run.json").is_file(): raise DataError(f"{f} is not a run")
    return Run(f)
