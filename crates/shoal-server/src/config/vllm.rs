//! `engine = "vllm"`: which of vLLM's own arguments the server sets, and what to write in their place.
//!
//! Apart because it is the one list of another program's words here. Whatever is not in it is vLLM's business.

use toml::de::{DeTable, DeValue};

use super::Engine;
use super::parse::Reader;

/// Arguments that may not be given, and what else to do.
const SET: [(&str, &str); 14] = [
    ("model", "; `source` names the model"),
    ("served-model-name", "; clients call the model by its `name`"),
    ("max-model-len", ", and set `context`"),
    ("dtype", ", and set `dtype`"),
    ("revision", ", and set `revision`"),
    ("gpu-memory-utilization", ", and set `max` where the model is to have less"),
    ("kv-cache-memory-bytes", ", and set `max` where the model is to have less"),
    ("kv-cache-memory", ", and set `max` where the model is to have less"),
    ("enable-sleep-mode", "; Shoal puts the model to sleep"),
    ("worker-cls", ""),
    ("host", ""),
    ("port", ""),
    ("uds", ""),
    ("api-server-count", ""),
];

/// Complains of arguments of a model of this engine that the server sets.
pub(super) fn check_args<'i>(reader: &mut Reader<'i>, table: &DeTable<'i>, engine: Engine) {
    let Some(value) = table.get("args").filter(|_| engine == Engine::Vllm) else { return };
    let DeValue::Array(args) = value.get_ref() else { return };
    for arg in args {
        let Some((name, remedy)) = arg.get_ref().as_str().and_then(of_ours) else { continue };
        reader.bad(arg, "args", format!("vLLM's --{name} is set by the server; leave it out{remedy}"));
    }
}

/// The argument that this is, as vLLM reads it: `--a-b`, `--a_b`, `--a-b=c`.
fn of_ours(arg: &str) -> Option<(&'static str, &'static str)> {
    let name = arg.strip_prefix("--")?.split('=').next()?.replace('_', "-");
    SET.into_iter().find(|(set, _)| *set == name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_are_known_in_each_spelling() {
        for arg in ["--port", "--port=8000", "--gpu_memory_utilization", "--gpu-memory-utilization=0.9"] {
            assert!(of_ours(arg).is_some(), "{arg}");
        }
        for arg in ["port", "-p", "--ports", "--max-num-seqs", "--enforce-eager", "--", ""] {
            assert_eq!(of_ours(arg), None, "{arg}");
        }
    }
}
