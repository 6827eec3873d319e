//! Functions of the host in a stream's order.

#![expect(unsafe_code, reason = "hands a boxed function through the driver")]

use core::any::Any;
use core::ffi::c_void;
use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::cuda::{SharedErrorLog, record};
use crate::device::HostFunction;
use crate::error::DeviceError;

/// What travels through the driver to its thread.
pub(super) struct HostCall {
    pub(super) function: HostFunction,
    pub(super) stream: u64,
    pub(super) errors: SharedErrorLog,
}

/// The driver's thread comes here; a panic must not go back into it.
pub(super) unsafe extern "C" fn run_host_call(data: *mut c_void) {
    // SAFETY: `launch_host` gave this box away, and the driver calls once.
    let call = unsafe { Box::from_raw(data.cast::<HostCall>()) };
    let HostCall { function, stream, errors } = *call;
    if let Err(panic) = catch_unwind(AssertUnwindSafe(function)) {
        let message = panic_message(panic.as_ref());
        record(&errors, DeviceError::HostFunctionPanicked { stream, message });
    }
}

fn panic_message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "(not a text)".to_owned())
}
