//! A configuration for `shoal simulate`: read as for a server, but for a device that need not be here.
//!
//! Apart because nothing of this machine may count: a plan for a GPU that is still to be bought comes out the same on a
//! laptop. So the budget of the device has to be said, and where nothing is said of host memory, there is enough.

use std::path::Path;

use shoal_core::bytes::ByteCount;

use super::gpu::{DRIVER_MIN, Gpu, Gpus};
use super::{ConfigError, DeviceChoice, Problem, ProblemKind, ServerConfig, Sited, Surroundings, parse};

/// More than any machine has, and little enough to be added up.
const ENDLESS: ByteCount = ByteCount(1 << 56);

/// A configuration for a world in virtual time.
#[derive(Clone, Debug)]
pub(crate) struct SimulatedConfig {
    pub(crate) config: ServerConfig,
    /// Host bytes for copies, where they are limited.
    pub(crate) host_budget: Option<ByteCount>,
    /// The device stands for a GPU.
    pub(crate) is_gpu: bool,
}

impl SimulatedConfig {
    /// Reads `file`; budgets that are given take the place of the file's.
    ///
    /// # Errors
    /// [`ConfigError`], as for a server, and where nobody says how large the device is.
    pub(crate) fn load(
        file: &Path,
        surroundings: Surroundings,
        device_budget: Option<ByteCount>,
        host_budget: Option<ByteCount>,
    ) -> Result<Self, ConfigError> {
        let unreadable = |source| ConfigError::Unreadable { file: file.to_owned(), source };
        let text = std::fs::read_to_string(file).map_err(unreadable)?;
        let file = std::path::absolute(file).map_err(unreadable)?;
        let wrong = |problems| ConfigError::Wrong { file: file.clone(), problems };
        let mut sections = parse(&text).map_err(wrong)?;
        let server = &mut sections.server;
        let unsited = |value| Sited { value, line: 0, column: 0 };
        server.device_budget = device_budget.map(unsited).or(server.device_budget.take());
        server.host_budget = host_budget.map(unsited).or(server.host_budget.take());
        let Some(budget) = server.device_budget.as_ref().map(|budget| budget.value) else {
            let why = "nothing says how much of the device models may have: --device-budget 72GiB, or `device_budget` \
                       under [server]";
            let kind = ProblemKind::Device { why: why.to_owned() };
            return Err(wrong(vec![Problem { line: 0, column: 0, kind }]));
        };
        let host_budget = server.host_budget.as_ref().map(|budget| budget.value);
        server.host_budget.get_or_insert(unsited(ENDLESS));
        let is_gpu = server.device.as_ref().is_none_or(|device| device.value != DeviceChoice::Sim);
        let device = if is_gpu { DeviceChoice::Cuda(0) } else { DeviceChoice::Sim };
        server.device = Some(Sited { value: device, line: 0, column: 0 });
        let config = sections.resolve(&file, &with_gpu(surroundings, budget)).map_err(wrong)?;
        Ok(Self { config, host_budget, is_gpu })
    }
}

/// The machine as if it had a GPU of this budget, and nobody used it.
fn with_gpu(surroundings: Surroundings, budget: ByteCount) -> Surroundings {
    let gpu = Gpu {
        index: 0,
        uuid: "GPU-simulated".to_owned(),
        name: "a simulated GPU".to_owned(),
        driver: DRIVER_MIN.to_string(),
        total: budget,
        free: budget,
    };
    Surroundings {
        nvidia: Some("simulated".into()),
        gpus: Some(Gpus { listed: Ok(vec![gpu]), visible: None }),
        budgets_before: None,
        ..surroundings
    }
}
