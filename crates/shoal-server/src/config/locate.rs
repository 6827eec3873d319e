//! Where the file is looked for, and the sample shown where there is none.

use std::path::{Path, PathBuf};

use super::error::ConfigError;
use super::surroundings::Surroundings;

/// A file to begin with.
pub const SAMPLE: &str = r#"# shoal.toml
[server]
device = "auto"                 # "sim" simulates a device in RAM
device_budget = "2GiB"          # what all models together may hold on it
quantum = "3s"                  # a busy model's turn, while another waits for its memory

[[model]]
name = "chat"
source = "HuggingFaceTB/SmolLM2-135M-Instruct"   # a directory, or an id on the hub

[[model]]
name = "documents"
source = "sentence-transformers/all-MiniLM-L6-v2"
"#;

/// The file to read: the one named, else `./shoal.toml`, else `shoal/shoal.toml` in the user's config directory.
///
/// # Errors
/// [`ConfigError::NotFound`] with the places looked at; a file that was named is returned unseen.
pub fn find_file(named: Option<&Path>, surroundings: &Surroundings) -> Result<PathBuf, ConfigError> {
    if let Some(named) = named {
        return Ok(named.to_owned());
    }
    let mut looked_at = vec![surroundings.working_dir.join("shoal.toml")];
    looked_at.extend(surroundings.config_home.as_ref().map(|home| home.join("shoal").join("shoal.toml")));
    match looked_at.iter().find(|file| file.is_file()) {
        Some(file) => Ok(file.clone()),
        None => Err(ConfigError::NotFound { looked_at }),
    }
}
