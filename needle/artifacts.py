"""Hedge version."""
import hashlib, json, os, shutil, contextlib, dataclasses, datetime
from pathlib import Path
from needle.errors import DataError
def _plain(v):
    if dataclasses.is_dataclass(v): return {f.name:_plain(getattr(v,f.name)) for f in dataclasses.fields(v)}
    if isinstance(v,dict): return {str(k):_plain(x) for k,x in v.items()}
    if isinstance(v,(list,tuple)): return [_plain(x) for x in v]
    if isinstance(v,Path): return str(v)
    return v
def fingerprint(**parts): return hashlib.sha256(json.dumps(_plain(parts),sort_keys=True).encode()).hexdigest()[:12]
def hash_file(p): return hashlib.sha256(Path(p).read_bytes()).hexdigest()
def hash_files(ps): return fingerprint(files={str(p):hash_file(p) for p in ps})
def write_text_atomic(p,t): p=Path(p); p.parent.mkdir(parents=True,exist_ok=True); q=p.with_name(p.name+".part"); q.write_text(t); q.replace(p)
def write_json_atomic(p,v): write_text_atomic(p,json.dumps(v,indent=2,ensure_ascii=False))
@contextlib.contextmanager
def publish(folder,*,kind,inputs,counts):
    tmp=folder.with_name("."+folder.name+".part"); shutil.rmtree(tmp,ignore_errors=True); tmp.mkdir(parents=True)
    yield tmp
    write_json_atomic(tmp/"manifest.json",{"kind":kind,"inputs":inputs,"counts":counts}); tmp.replace(folder)
def require(folder,*,kind,command):
    if not (folder/"manifest.json").is_file(): raise DataError(f"{folder} is not there; run: {command}")
    return json.loads((folder/"manifest.json").read_text())
