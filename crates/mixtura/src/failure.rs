//! How a command ends when it does not succeed: what is said, and with which exit code.

use mixtura_train::error::TrainError;

/// An error with the exit code it deserves.
#[derive(Debug)]
pub struct Failure {
    /// 1 failed while running, 2 wrong usage or config, 130 interrupted.
    pub code: u8,
    /// One paragraph; none when everything was said already.
    pub message: Option<String>,
}

impl Failure {
    /// What was asked for cannot be done as asked.
    pub fn usage(message: impl Into<String>) -> Self {
        Self { code: 2, message: Some(message.into()) }
    }

    /// It was tried and failed.
    pub fn running(message: impl Into<String>) -> Self {
        Self { code: 1, message: Some(message.into()) }
    }

    /// Ends with `code`; the result has been printed.
    pub fn silent(code: u8) -> Self {
        Self { code, message: None }
    }
}

impl From<TrainError> for Failure {
    fn from(error: TrainError) -> Self {
        Self { code: error.exit_code(), message: Some(error.to_string()) }
    }
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Self { code: 1, message: Some(format!("{error:#}")) }
    }
}
