//! `engine = "vllm"`: which of vLLM's own arguments the server sets, and what to write in their place; and its own key.
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

const WAKE_CHECK: &str = "wake_check";

/// Complains of arguments of a model of this engine that the server sets.
pub(super) fn check_args<'i>(reader: &mut Reader<'i>, table: &DeTable<'i>, engine: Engine) {
    let Some(value) = table.get("args").filter(|_| engine == Engine::Vllm) else { return };
    let DeValue::Array(args) = value.get_ref() else { return };
    for arg in args {
        let Some((name, remedy)) = arg.get_ref().as_str().and_then(of_ours) else { continue };
        reader.bad(arg, "args", format!("vLLM's --{name} is set by the server; leave it out{remedy}"));
    }
}

/// Whether a token is to be compared after each wake; no, where nothing is said. Complains where no engine would do it.
pub(super) fn wake_check<'i>(reader: &mut Reader<'i>, table: &DeTable<'i>, engine: Engine) -> bool {
    let Some(value) = table.get(WAKE_CHECK) else { return false };
    if engine != Engine::Vllm {
        reader.bad(value, WAKE_CHECK, "only `engine = \"vllm\"` has it");
    }
    reader.boolean(table, WAKE_CHECK)
}

/// The argument that this is, as vLLM reads it: `--a-b`, `--a_b`, `--a-b=c`.
fn of_ours(arg: &str) -> Option<(&'static str, &'static str)> {
    let name = arg.strip_prefix("--")?.split('=').next()?.replace('_', "-");
    SET.into_iter().find(|(set, _)| *set == name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::tests::load_here;

    #[test]
    fn a_wake_is_checked_where_that_is_said_and_by_vllm_alone() {
        let told = |more: &str| {
            let text = format!("[[model]]\nname = 'a'\nsource = 'a'\n{more}");
            load_here(&text).map(|config| config.models[0].wake_check)
        };
        assert_eq!(told("engine = 'vllm'"), Ok(false));
        assert_eq!(told("engine = 'vllm'\nwake_check = true"), Ok(true));
        for (more, says) in [
            ("engine = 'vllm'\nwake_check = 1", "`wake_check` must be true or false, not a whole number"),
            ("wake_check = true", "`wake_check`: only `engine = \"vllm\"` has it"),
        ] {
            let said = told(more).expect_err(says);
            assert!(said.contains(says), "{said}");
        }
    }

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
