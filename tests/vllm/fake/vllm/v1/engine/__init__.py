import enum


class EngineCoreRequestType(enum.Enum):
    ADD = b"\x00"
    UTILITY = b"\x03"
    WAKEUP = b"\x05"
