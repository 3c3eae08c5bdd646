// Package private makes new files and folders that nobody but their owner may
// read, on systems where a file mode says so and on Windows, where it says
// nothing: there SYSTEM and Administrators, who may read everything anyway, have
// their rights, too, and nothing comes down from the folder above. On Windows it
// also tells of a file or folder that is there whether it is in strangers' hands.
package private
