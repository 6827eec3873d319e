"""Two sets of weights take turns in memory that holds only one of them. Needs no server, no torch and no GPU."""

import shoal

MIB = 1 << 20


def main() -> None:
    memory = shoal.MemoryManager(device="sim", device_budget="64MiB", host_budget="128MiB")
    regions = {}
    for name in ("first", "second"):
        region = memory.region(name, 48 * MIB, kind="weights", backing="keep")
        region.stage(0, name.encode().ljust(16) * (48 * MIB // 16))  # Into host memory; the device is not touched.
        region.seal()  # Clean from here on: giving it up costs no copy.
        regions[name] = region
    addresses = {name: region.address for name, region in regions.items()}

    for name, other in [("first", "second"), ("second", "first"), ("first", "second")]:
        regions[other].sleep()
        regions[name].wake()
        text = bytes(regions[name].buffer(0, 16)).decode().strip()
        assert text == name
        assert regions[name].address == addresses[name]
        print(f"{name} is on the device at {regions[name].address:#x} and begins with {text!r}")


if __name__ == "__main__":
    main()
