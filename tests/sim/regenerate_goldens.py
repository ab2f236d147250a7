"""Write tests/golden anew after an intended change of dynamics: python -m tests.sim.regenerate_goldens."""

from __future__ import annotations

import json

from .scenarios import FOLDER, SCENARIOS, play

if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name in SCENARIOS:
        text = json.dumps(play(name), indent=2) + "\n"
        path = FOLDER / f"{name}.json"
        changed = not path.exists() or path.read_text(encoding="utf-8") != text
        path.write_text(text, encoding="utf-8")
        print(f"{path.name}: {'changed' if changed else 'as before'}")
