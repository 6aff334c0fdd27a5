"""Pure mathematics shared by the methods, each written once."""
