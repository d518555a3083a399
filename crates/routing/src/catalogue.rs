//! What names mean: the keys of a policy's or system's [`recipe`], the manual that [`explain`] prints, and the [`dictionary`] between
//! libraries that call different numbers "load-balancing loss".

pub mod recipe;
pub mod explain;
pub mod dictionary;
