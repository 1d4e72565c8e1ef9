"""Child of the kill test: puts versions until it is killed, and prints a line after each acknowledgement."""

import random
import sys

from runtime.store import TenantStore
from runtime.versions import ModuleFacts

folder, seed = sys.argv[1], int(sys.argv[2])
chance = random.Random(seed)
facts = ModuleFacts(fingerprint="sha256:0", task="embed")
store = TenantStore(folder)
print("open", flush=True)
while True:
    tenant = f"t{chance.randrange(4)}"
    version, _ = store.put(tenant, chance.randbytes(chance.choice((10, 5_000, 200_000))), facts)
    # One write call, so a kill cannot leave half a line.
    sys.stdout.write(f"{tenant} {version.version} {version.digest}\n")
    sys.stdout.flush()
    if chance.random() < 0.1:
        store.collect_garbage(store.garbage())
