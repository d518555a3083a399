//! Being asked to stop: SIGINT (Ctrl-C), SIGTERM and SIGHUP (the terminal is gone).
//!
//! While a run is being opened (data read, a tokenizer trained) there is nothing to save and no place to look at a flag, so the first
//! signal ends the process. From [`Interrupt::save_first`] on, the first signal asks the loop to save and stop, and the second ends
//! the process. Either way the exit code is 130.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use signal_hook::consts::{SIGINT, SIGTERM};

/// Set when the process was asked to stop. Cheap to clone and to ask.
#[derive(Debug, Clone, Default)]
pub struct Interrupt {
    requested: Arc<AtomicBool>,
    /// Whether a signal ends the process there and then.
    at_once: Arc<AtomicBool>,
}

impl Interrupt {
    /// A flag that nothing sets by itself, for a loop inside another program.
    pub fn new() -> Self {
        Self::default()
    }

    /// Listens for signals; until [`Interrupt::save_first`], the first one exits with 130 at once.
    ///
    /// A SIGHUP that was ignored when the process started stays ignored: that is what `nohup` asks for.
    pub fn on_signals() -> std::io::Result<Self> {
        let flag = Self::new();
        flag.at_once.store(true, Ordering::SeqCst);
        let mut signals = vec![SIGINT, SIGTERM];
        #[cfg(unix)]
        if hangup_is_ours() {
            signals.push(signal_hook::consts::SIGHUP);
        }
        for signal in signals {
            // Order matters: the shutdown hook looks at the flag before the last line sets it.
            signal_hook::flag::register_conditional_shutdown(signal, 130, Arc::clone(&flag.at_once))?;
            signal_hook::flag::register(signal, Arc::clone(&flag.requested))?;
            signal_hook::flag::register(signal, Arc::clone(&flag.at_once))?;
        }
        Ok(flag)
    }

    /// From now on there is something to save: the first signal only asks.
    pub fn save_first(&self) {
        self.at_once.store(false, Ordering::SeqCst);
    }

    /// Asks the loop to stop.
    pub fn request(&self) {
        self.requested.store(true, Ordering::SeqCst);
    }

    /// Whether it was asked.
    pub fn requested(&self) -> bool {
        self.requested.load(Ordering::SeqCst)
    }
}

/// Whether a SIGHUP may be listened for: not if whoever started the process had it ignored. Linux tells; elsewhere its disposition is
/// left as it is (it ends the process, or under `nohup` does nothing), and the run goes on from its newest checkpoint.
#[cfg(unix)]
fn hangup_is_ours() -> bool {
    let Ok(status) = std::fs::read_to_string("/proc/self/status") else { return false };
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    // Bit n - 1 stands for signal n.
    let mask = ignored.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    mask.is_some_and(|mask| mask >> (signal_hook::consts::SIGHUP - 1) & 1 == 0)
}
