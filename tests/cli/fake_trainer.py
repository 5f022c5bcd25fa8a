# ruff: noqa: T201 standard output is what it is for
"""A process that obeys the trainer's contract and trains nothing. Plain JSON, so that it starts in milliseconds.

With "learn", the loss is a function of rank, learning rate and step, and the attempt stops at pauseAtStep.

usage: fake_trainer.py prepare|train|generate PLAN.json CONFIG.json

PLAN.json: {"prepare": "done", "attempts": ["crash", "done", …]}; the last entry serves all later attempts.
"""

import http.server
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

RECEIPT = {
    "dataHash": "a" * 64,
    "trainRows": 1200,
    "trainTokens": 48000,
    "trainTargetTokens": 24000,
    "trainSequences": 100,
    "evalRows": 10,
    "evalTokens": 400,
    "truncated": 2,
    "dropped": 0,
    "fullyMasked": 1,
    "duplicates": 0,
    "evalInTrain": 0,
    "longest": 480,
    "lengths": {"256": 60, "512": 4},
    "packingEfficiency": 0.931,
    "samples": ["<user>What is [bold]4-bit[/bold]?<assistant>⟦A small number.⟧"],
}
ENDS = {
    "user-error": (40, "UserError", 'spec.lora.targetModules: "q_prj" matches no layer'),
    "oom": (41, "OutOfDeviceMemory", "out of memory on rank 0"),
    "crash": (1, "Crashed", "RuntimeError: something broke"),
    "preempted": (43, "Preempted", "told to stop; a checkpoint is written"),
}
PROGRESS = ("step", "totalSteps", "epoch", "loss", "evalLoss", "bestEvalLoss")
STEPS = 20
TOKENS = 12345
"""Tokens of all steps: a number that no progress report contains."""
MEMORY = {"measured": {"peak": 3 << 30, "quantizedWeights": 1 << 30, "adapterWeights": 20 << 20}}


class Trainer:
    def __init__(self, config):
        self.config = config
        self.resumed_from = self.checkpoint() or 0
        self.report = {
            "job": config["job"]["name"],
            "attempt": config["attempt"],
            "section": "Train",
            "step": self.resumed_from,
            "totalSteps": 20,
            "firstStep": self.resumed_from,
            "epoch": "0.5",
            "loss": "2.5",
            "evalLoss": "3.25",
            "learningRate": "0.0002",
            "tokensPerSecond": "1234.5",
            "etaSeconds": 75,
            "tokens": 5000,
            "sectionSeconds": {"Load": 2.0, "Train": 61.0},
            "memory": MEMORY,
        }

    def checkpoint(self):
        path = Path(self.config["checkpointUri"]) / "step"
        return int(path.read_text()) if path.exists() else None

    def save(self, step):
        self.report["step"] = step
        folder = Path(self.config["checkpointUri"])
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "step").write_text(str(step))

    def serve(self):
        trainer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                body = json.dumps(trainer.report).encode()
                self.send_response(200)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        (Path(self.config["portsDir"]) / "rank-0.port").write_text(str(server.server_port))

    def leave(self, code, reason, message, **more):
        progress = {k: v for k, v in self.report.items() if k in PROGRESS}
        word = {"exitCode": code, "reason": reason, "message": message, "progress": progress, "memory": MEMORY}
        word |= {"firstStep": self.resumed_from, **more}
        Path(self.config["terminationMessagePath"]).write_text(json.dumps(word))
        sys.exit(code)

    def train(self, behaviour):
        print(f"attempt {self.config['attempt']}: {behaviour}", flush=True)
        if behaviour == "done":
            self.serve()
            time.sleep(0.8)  # long enough to be asked
            self.report |= {"step": 20, "evalLoss": "2.125", "epoch": "2"}
            self.publish()
        if behaviour == "learn":
            self.learn()
        if behaviour == "wait":
            signal.signal(signal.SIGTERM, self.preempted)
            self.save(self.resumed_from + 7)
            self.serve()
            time.sleep(60)
        if behaviour == "stubborn":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            self.spawn_rank()
            self.serve()
            time.sleep(60)
        if behaviour == "deaf":  # as Python is before its first line
            self.serve()
            time.sleep(60)
        if behaviour == "silent":
            for line in range(30):
                print(f"log line {line}", flush=True)
            self.spawn_rank()
            os.kill(os.getpid(), signal.SIGSEGV)
        self.save(self.resumed_from + 3)
        self.leave(*ENDS[behaviour])

    def learn(self):
        spec = self.config["spec"]
        rate, rank = float(spec["training"]["learningRate"]), spec["lora"]["rank"]
        pause = min(self.config.get("pauseAtStep", STEPS), STEPS)
        for step in range(self.resumed_from + 1, pause + 1):
            with (Path(self.config["checkpointUri"]).parent / "steps").open("a") as steps:
                steps.write(f"{step}\n")
        loss = f"{1 + abs(math.log10(rate / 1e-3)) / 10 + abs(rank - 16) / 100 + 1 / pause:.6g}"
        self.report |= {"evalLoss": loss, "bestEvalLoss": loss}
        self.save(pause)
        if pause < STEPS:
            self.leave(43, "Preempted", f"paused at step {pause} of {STEPS}; a checkpoint is written")
        self.publish()

    def publish(self):
        uri = self.config["spec"]["output"]["destination"]
        adapter = {"uri": uri, "manifestUri": f"{uri}/manifest.json", "manifestSha256": "b" * 64}
        Path(uri).mkdir(parents=True, exist_ok=True)
        Path(adapter["manifestUri"]).write_text(json.dumps({"runUid": self.config["job"]["uid"]}))
        self.leave(0, "Completed", "", adapter=adapter, tokens=TOKENS)

    def spawn_rank(self):
        """As torchrun does it: a child in a session of its own."""
        rank = subprocess.Popen(["sleep", "60"], start_new_session=True)
        (Path(self.config["portsDir"]) / "rank.pid").write_text(str(rank.pid))

    def preempted(self, *_):
        self.leave(*ENDS["preempted"])


def main():
    what, plan_path, config_path = sys.argv[1:]
    plan = json.loads(Path(plan_path).read_text())
    config = json.loads(Path(config_path).read_text())
    if what == "train":
        behaviours = plan["attempts"]
        trainer = Trainer(config)
        if config["spec"]["lora"]["rank"] in plan.get("failingRanks", ()):
            trainer.leave(*ENDS["user-error"])
        time.sleep(plan.get("seconds", 0))
        trainer.train(behaviours[min(config["attempt"], len(behaviours)) - 1])
    elif plan.get("prepare", "done") == "done":
        print("a library says something")
        print(json.dumps({**RECEIPT, **plan.get("receipt", {})}))
    elif plan["prepare"] == "wait":
        time.sleep(60)
    else:
        Trainer(config).leave(*ENDS[plan["prepare"]])


if __name__ == "__main__":
    main()
