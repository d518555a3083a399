//! SIGINT and SIGTERM ask the loop to stop after the step under way; a second one ends the process at once.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use signal_hook::consts::{SIGINT, SIGTERM};

/// Set when the process was asked to stop. Cheap to clone and to ask.
#[derive(Debug, Clone, Default)]
pub struct Interrupt(Arc<AtomicBool>);

impl Interrupt {
    /// A flag that nothing sets by itself, for a loop inside another program.
    pub fn new() -> Self {
        Self::default()
    }

    /// A flag set by the first SIGINT or SIGTERM; the second exits with 130 at once.
    pub fn on_signals() -> std::io::Result<Self> {
        let flag = Self::new();
        for signal in [SIGINT, SIGTERM] {
            // Order matters: the shutdown hook looks at the flag before the line below sets it.
            signal_hook::flag::register_conditional_shutdown(signal, 130, Arc::clone(&flag.0))?;
            signal_hook::flag::register(signal, Arc::clone(&flag.0))?;
        }
        Ok(flag)
    }

    /// Asks the loop to stop.
    pub fn request(&self) {
        self.0.store(true, Ordering::SeqCst);
    }

    /// Whether it was asked.
    pub fn requested(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }
}
